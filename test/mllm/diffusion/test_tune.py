"""A quantised head that was fine-tuned acts from its file as in memory, nearer to the teacher; and lies are refused."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mllm.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from mllm.config import MAX_COPIES, DiffusionConfig  # noqa: E402
from mllm.diffusion.arms import ENDS  # noqa: E402
from mllm.diffusion.tune import TuneConfig, tune_head_  # noqa: E402
from mllm.errors import PolicyError  # noqa: E402
from mllm.flops import step_flops  # noqa: E402
from mllm.policy import make_policy  # noqa: E402
from mllm.quantise import observe, quantised, vla_config  # noqa: E402
from mllm.sweep import draw_clips, replay  # noqa: E402
from quant.dfa import DistilConfig  # noqa: E402
from quant.packed import PackedLinear  # noqa: E402
from quant.talora import Copies, TaloraConfig  # noqa: E402

STEPS = 4
TUNE = TuneConfig(TaloraConfig(2, 2), DistilConfig(60, batch=64, rate=3e-3), dfa=True)


@pytest.fixture(scope="module")
def clips(demonstrations):
    return draw_clips(demonstrations, 6, 2)


@pytest.fixture(scope="module")
def tuned(tiny_diffusion, clips, tmp_path_factory):
    """The policy with a fine-tuned head of 4 bits, in memory and in a folder, and what came of it."""
    torch.manual_seed(0)
    policy, folder = make_policy(str(tiny_diffusion)), tmp_path_factory.mktemp("tuned")
    found = {"before": actions(policy, clips), "flops": step_flops(policy.model, 5)}
    teacher, hidden = copy.deepcopy(policy.model.action_head.denoiser), torch.randn(64, 3, 32)
    wanted = policy.model.action_head(hidden)
    with quantised(policy, vla_config(4, 4, tuned_head=True), observe(policy, clips), clips):
        found["untuned"] = actions(policy, clips)
        found |= tune_head_(policy, teacher, clips, TUNE)
        found["actions"], found["config"] = actions(policy, clips), policy.model.config
        found["packed"] = {name: p for name, p in policy.model.named_modules() if isinstance(p, PackedLinear)}
        save_checkpoint(folder, policy.model, policy.tokenizer)
    assert torch.equal(policy.model.action_head(hidden), wanted)
    return policy, folder, found


def actions(policy, clips):
    return np.concatenate(replay(policy, clips).actions)


def test_from_its_file_it_acts_bit_for_bit_as_in_memory(tuned, clips):
    _, folder, found = tuned
    again = make_policy(str(folder))
    assert again.model.config == found["config"]
    assert again.model.config.diffusion.table == tuple(found["table"])
    assert len(found["table"]) == STEPS
    assert set(found["table"]) == {0, 1}
    copies = [part for part in again.model.modules() if isinstance(part, Copies)]
    assert {type(layer) for part in copies for layer in part.copies} == {PackedLinear}
    for name, layer in found["packed"].items():
        assert torch.equal(layer.weight(), again.model.get_submodule(name).weight()), name
    assert np.array_equal(actions(again, clips), found["actions"])
    assert step_flops(again.model, 5) == found["flops"]


def test_each_step_uses_the_copy_that_the_table_names(tuned):
    model, _ = load_checkpoint(tuned[1])
    head, hidden = model.action_head, torch.randn(5, 3, 32)
    layers = [part for part in head.denoiser.modules() if isinstance(part, Copies)]

    def predict(step, x):
        for layer in layers:
            layer.use = tuned[2]["table"][step]
        return head.denoiser(x, head.level(step, 5), hidden.flatten(1))

    expected = head.schedule.sample(predict, head.noise.flatten().expand(5, -1)).view(5, 3, 7)
    assert torch.equal(head(hidden), expected)
    assert any(not torch.equal(layer.copies[0].weight(), layer.copies[1].weight()) for layer in layers)


def test_fine_tuning_brings_the_actions_nearer_to_full_precision(tuned):
    found = tuned[2]
    assert found["last"] < found["first"]
    assert np.abs(found["actions"] - found["before"]).mean() < np.abs(found["untuned"] - found["before"]).mean()


def test_afterwards_the_policy_is_as_it_was(tuned, clips):
    policy, _, found = tuned
    assert policy.model.config.diffusion.table == ()
    assert not [part for part in policy.model.modules() if isinstance(part, (PackedLinear, Copies))]
    np.testing.assert_allclose(actions(policy, clips), found["before"], atol=1e-5)


def test_only_the_ends_of_a_head_that_is_tuned_have_more_bits():
    names = [f"action_head.denoiser.{name}" for name in (*ENDS, "blocks.0.fc1", "time2")]
    assert [vla_config(4, 6, tuned_head=True).bits_of(name) for name in names] == [(8, 8)] * 4 + [(4, 6)] * 2
    assert {vla_config(4, 6).bits_of(name) for name in names} == {(8, 8)}


def test_other_heads_and_heads_in_full_precision_are_refused(tiny, tiny_diffusion, clips):
    other, policy = make_policy(str(tiny)), make_policy(str(tiny_diffusion))
    with pytest.raises(PolicyError, match="head is 'tokens': TALoRA and DFA are for the steps of head 'diffusion'"):
        tune_head_(other, None, clips, TUNE)
    with pytest.raises(PolicyError, match="layer 'enter' of the head is not quantised"):
        tune_head_(policy, policy.model.action_head.denoiser, clips, TUNE)
    with pytest.raises(PolicyError, match="0 adapters"):
        TuneConfig(TaloraConfig(0))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([0, 1, 1], "it must name a copy for each of 4 steps"),
        ([0] * 100_000, "it must name a copy for each of 4 steps"),
        (7, "it must name a copy for each of 4 steps"),
        ([0, 2, 2, 2], "none of them left out"),
        ([0, 1, 2, 10**12], "none of them left out"),
        ([-1, 0, 0, 1], "none of them left out"),
        ([0, 1, True, 1], "whole numbers"),
        ([0, 1, 1.0, 1], "whole numbers"),
        ([0, 1, [1], 1], "whole numbers"),
        ([0, 1, 2, 1], r"lacks 'action_head.denoiser.*copies.2.*weight'"),
        ([0, 0, 0, 0], "names layer 'action_head.denoiser.*copies.1': the model has no such"),
        ([], "names layer 'action_head.denoiser.*copies.0': the model has no such"),
    ],
)
def test_a_checkpoint_with_a_table_that_lies_is_an_error(tuned, tmp_path, table, message):
    for path in tuned[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["flashvla"]["diffusion"]["table"] = table
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PolicyError, match=message):
        load_checkpoint(tmp_path)


def test_more_copies_than_adapters_can_be_are_refused():
    many = MAX_COPIES + 1
    assert DiffusionConfig(100, MAX_COPIES, table=list(range(MAX_COPIES))).copies == MAX_COPIES
    with pytest.raises(PolicyError, match="at most 64 copies"):
        DiffusionConfig(100, many, table=list(range(many)))
