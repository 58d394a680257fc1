"""A quantised policy acts as it did before it was saved, composes with token selection, and is refused if it lies."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

import numpy as np  # noqa: E402

from mllm.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from mllm.compress import CompressConfig  # noqa: E402
from mllm.errors import PolicyError  # noqa: E402
from mllm.flops import step_flops  # noqa: E402
from mllm.policy import make_policy  # noqa: E402
from mllm.quantise import group_of, hold_out, observe, quantised, sensitivity, vla_config  # noqa: E402
from mllm.sweep import draw_clips, replay  # noqa: E402
from mllm.tensor_file import read_metadata  # noqa: E402
from mllm.tokenizer import WordTokenizer  # noqa: E402
from mllm.vla import VLA, init_random  # noqa: E402
from quant.checkpoint import expect_, headers, unpack_  # noqa: E402
from quant.convert import quantize_  # noqa: E402
from quant.packed import PackedLinear  # noqa: E402

QKV = "language_model.model.layers.1.self_attn.qkv_proj"


@pytest.fixture(scope="module")
def clips(demonstrations):
    return draw_clips(demonstrations, 6, 2)


@pytest.fixture(scope="module")
def seen(tiny, clips):
    return observe(make_policy(str(tiny)), clips)


@pytest.fixture(scope="module")
def regression(tiny, tmp_path_factory):
    """The tiny model with the mini's head: a chunk of actions in one pass."""
    config = replace(load_checkpoint(tiny)[0].config, decoding="slots", chunk=3, head="regression", execute=2)
    folder = tmp_path_factory.mktemp("regression")
    save_checkpoint(folder, init_random(VLA(config), 1), WordTokenizer())
    return folder


@pytest.fixture
def folder(tiny, clips, seen, tmp_path):
    policy = make_policy(str(tiny))
    quantize_(policy.model, vla_config(), seen, lambda: replay(policy, clips))
    save_checkpoint(tmp_path, policy.model, policy.tokenizer)
    return tmp_path


def actions(policy, clips):
    return np.concatenate(replay(policy, clips).actions)


def packed_layers(model):
    return {name: part for name, part in model.named_modules() if isinstance(part, PackedLinear)}


@pytest.mark.parametrize("head", ["tiny", "regression"])
def test_a_saved_policy_acts_bit_for_bit_as_the_quantised_one(head, clips, request, tmp_path):
    policy = make_policy(str(request.getfixturevalue(head)))
    quantize_(policy.model, vla_config(), observe(policy, clips), lambda: replay(policy, clips))
    left = [name for name, part in policy.model.named_modules() if isinstance(part, torch.nn.Linear)]
    assert left == ["language_model.lm_head"]
    save_checkpoint(tmp_path, policy.model, policy.tokenizer)
    for again in (make_policy(str(tmp_path)), make_policy("mini", checkpoint=str(tmp_path))):
        assert list(packed_layers(again.model)) == list(packed_layers(policy.model))
        assert np.array_equal(actions(policy, clips), actions(again, clips))


def test_a_policy_of_eight_bits_acts_almost_as_before(regression, clips):
    policy = make_policy(str(regression))
    before, config = actions(policy, clips), vla_config(8, 8)
    with quantised(policy, config, observe(policy, clips), clips):
        assert packed_layers(policy.model)
        assert np.abs(actions(policy, clips) - before).mean() < 0.05
    assert not packed_layers(policy.model)
    assert np.array_equal(actions(policy, clips), before)


@pytest.mark.parametrize("method", ["flashvla", "tokencarve", "fastv"])
def test_keeping_every_token_of_a_quantised_model_changes_no_bit_and_keeping_few_still_acts(folder, clips, method):
    plain, way = actions(make_policy(str(folder)), clips), {"method": method, "layer": 1}
    assert np.array_equal(actions(make_policy(str(folder), compress=way, keep=8), clips), plain)
    few = replay(make_policy(str(folder), compress=way, keep=4, reuse="gated"), clips)
    assert np.isfinite(np.concatenate(few.actions)).all()


def test_a_packed_model_costs_as_many_operations_as_the_one_it_was_made_of(tiny, folder):
    one, other = load_checkpoint(tiny)[0], load_checkpoint(folder)[0]
    config = CompressConfig("flashvla", keep=4, layer=1)
    assert step_flops(one, 5, config) == step_flops(other, 5, config)


def test_quantising_twice_is_refused(folder, clips):
    with pytest.raises(PolicyError, match=r"layer 'vision_backbone\..*' is quantised already"):
        observe(make_policy(str(folder)), clips)


def test_a_policy_is_checked_on_other_episodes_than_it_is_calibrated_on(demonstrations):
    clips = draw_clips(demonstrations, 12, 1)
    fit, held = hold_out(clips, 3)
    assert len(held) in (3, 4)
    assert len(fit) + len(held) == 12
    assert not {clip.path for clip in fit} & {clip.path for clip in held}
    with pytest.raises(PolicyError, match="6 episodes leave none to calibrate on beside 12"):
        hold_out(clips, 12)


def test_each_group_of_layers_is_tried_alone(regression, clips):
    policy = make_policy(str(regression))
    seen, reference = observe(policy, clips), replay(policy, clips)
    found = dict(sensitivity(policy, vla_config(4, 4), seen, clips, clips, reference))
    assert list(found) == list(dict.fromkeys(map(group_of, seen)))
    assert "language_model.model.layers.*.mlp.down_proj" in found
    assert all(apart["error"].mean() > 0 for apart in found.values())
    assert not packed_layers(policy.model)


def rewrite(folder: Path, change, header=lambda layers: None):
    path = folder / "model.safetensors"
    tensors, layers = safetensors.load_file(path), json.loads(read_metadata(path)["msfp"])
    change(tensors)
    header(layers)
    safetensors.save_file(tensors, path, metadata={"format": "pt", "msfp": json.dumps(layers)})


def test_the_safetensors_library_writes_what_we_read(folder, clips):
    plain = actions(make_policy(str(folder)), clips)
    rewrite(folder, lambda tensors: None)
    assert np.array_equal(actions(make_policy(str(folder)), clips), plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{QKV}.codes"), f"lacks '{QKV}.codes'"),
        (lambda t: t.pop(f"{QKV}.scale"), f"lacks '{QKV}.scale'"),
        (lambda t: t.update({f"{QKV}.bias": torch.zeros(96)}), f"has unknown '{QKV}.bias'"),
        (lambda t: t.update({f"{QKV}.codes": torch.zeros(96, 32, dtype=torch.uint8)}), r"codes' has shape \(96, 32\)"),
        (lambda t: t.update({f"{QKV}.codes": torch.zeros(96, 16)}), r"codes' is torch.float32, where torch.uint8"),
        (lambda t: t.update({f"{QKV}.scale": torch.zeros(96, dtype=torch.uint8)}), r"scale' is torch.uint8, where"),
        (lambda t: t[f"{QKV}.scale"].__setitem__(5, torch.nan), f"layer '{QKV}': scale of channel 5 is nan"),
        (lambda t: t[f"{QKV}.choice"].__setitem__(5, 200), f"layer '{QKV}': choice holds . to 200"),
    ],
)
def test_a_quantised_checkpoint_whose_tensors_lie_is_an_error_naming_them(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(PolicyError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.pop(QKV), f"lacks '.*q_proj.weight'.*has unknown '{QKV}.choice'"),
        (lambda h: h[QKV].update(formats=["E2M1", "E7M0"]), f"layer '{QKV}': FloatFormat.exponent is 7"),
        (lambda h: h[QKV]["activation"].update(scale=float("inf")), f"layer '{QKV}': Activation.scale is inf"),
        (lambda h: h.update({"model.layers.9": h[QKV]}), "names layer 'model.layers.9': the model has no such"),
        (lambda h: h[QKV].update(formats=["E4M3"]), rf"'{QKV}.codes' has shape \(96, 16\), where .* \(96, 32\)"),
    ],
)
def test_a_quantised_checkpoint_whose_header_lies_is_an_error_naming_the_layer(folder, change, message):
    rewrite(folder, lambda tensors: None, change)
    with pytest.raises(PolicyError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[1]"])
def test_a_quantised_checkpoint_whose_header_is_no_json_object_is_an_error_naming_the_folder(folder, text):
    path = folder / "model.safetensors"
    safetensors.save_file(safetensors.load_file(path), path, metadata={"msfp": text})
    with pytest.raises(PolicyError, match=f"{re.escape(str(folder))}: the header 'msfp' is"):
        load_checkpoint(folder)


def test_shards_each_describe_the_layers_whose_codes_they_hold(folder, clips):
    policy = make_policy(str(folder))
    save_checkpoint(folder, policy.model, policy.tokenizer, 10_000)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    described = [set(json.loads(read_metadata(shard).get("msfp", "{}"))) for shard in shards]
    assert sum(map(len, described)) == len(set().union(*described)) == len(packed_layers(policy.model))
    assert np.array_equal(actions(policy, clips), actions(make_policy(str(folder)), clips))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_a_quantised_checkpoint_is_never_there_in_full_precision(tiny, tmp_path):
    small, tokenizer = load_checkpoint(tiny)
    decoder = replace(
        small.config.decoder, hidden_size=384, intermediate_size=1024, num_attention_heads=6, num_key_value_heads=6,
        num_hidden_layers=16,
    )  # fmt: skip
    with torch.device("meta"):
        model = VLA(replace(small.config, decoder=decoder))
    names = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and ".layers." in name]
    weights = sum(4 * model.get_submodule(name).weight.numel() for name in names)
    expect_(model, {name: {"formats": ["E2M1"], "activation": None} for name in names})
    model.to_empty(device="cpu")
    for name, tensor in model.state_dict().items():
        tensor.fill_(1.0 if name.endswith("scale") else 0)
    unpack_(model)
    assert len(headers(model)) == len(names)
    save_checkpoint(tmp_path, model, tokenizer)
    del model

    def memory(key):
        return 1024 * int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    loaded, _ = load_checkpoint(tmp_path)
    taken = memory("VmHWM") - before
    assert len(packed_layers(loaded)) == len(names)
    assert weights > 110_000_000
    assert taken < 0.5 * weights, f"{taken / weights:.3f} times the weights"
