"""The policy as the node, the evaluation and the server see it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mllm.actions import ActionStatistics, ActionTokens  # noqa: E402
from mllm.config import named_config  # noqa: E402
from mllm.decoder import Kept  # noqa: E402
from mllm.errors import PolicyError  # noqa: E402
from mllm.flops import step_flops, visual_flops  # noqa: E402
from mllm.policy import PROPRIO_SIZES, Observation, Policy, check_action, make_policy  # noqa: E402
from mllm.tokenizer import BEFORE_ACTION, LIBERO_WORDS, LlamaTokenizer, WordTokenizer, openvla_prompt  # noqa: E402
from mllm.vla import VLA, init_random  # noqa: E402
from mllm.vla_policy import VLAPolicy, make_example, mini_policy  # noqa: E402

TASK = "pick up the black bowl between the plate and the ramekin and place it on the plate"


@pytest.fixture(scope="module")
def policy():
    return mini_policy(seed=0, threads=2)


def noise(seed):
    generator = np.random.default_rng(seed)
    cameras = ("agentview", "robot0_eye_in_hand")
    return Observation({name: generator.integers(0, 256, (256, 256, 3), np.uint8) for name in cameras})


def test_the_mini_is_a_policy_of_its_group_and_answers_actions():
    policy = make_policy("mini", seed=0)
    assert isinstance(policy, Policy)
    policy.reset(TASK)
    step = policy.act(noise(0))
    check_action(step.action)
    assert step.action.dtype == np.float32
    assert list(step.timing) == ["preprocess", "vision", "prefill", "decode"]
    assert all(seconds > 0 for seconds in step.timing.values())
    passes = policy.decoder.passes
    flops = {"passes": passes, "flops": step_flops(policy.model, 1 + 17, passes=passes)["step"]}
    flops["visual_flops"] = visual_flops(policy.config.decoder, 128)
    weights = sum(4 * parameter.numel() for parameter in policy.model.parameters())
    assert step.flags == {"prompt_tokens": 1 + 128 + 17, "weight_bytes": weights, **flops}


def test_mini_ar_looks_before_every_action_and_speaks_in_seven_tokens():
    policy = make_policy("mini-ar")
    assert (policy.config.decoding, policy.config.head, policy.execute) == ("causal", "tokens", 1)
    policy.reset(TASK)
    still = {name: np.zeros(size) for name, size in PROPRIO_SIZES.items()}
    steps = [policy.act(replace(noise(seed), proprio=still)) for seed in range(2)]
    assert all(step.timing["vision"] > 0 and step.looks for step in steps)
    centres = ActionTokens(256, 1000).centres
    assert max(np.abs(step.action[:, None] - centres).min(1).max() for step in steps) < 1e-6


def test_what_a_look_costs_follows_the_compression_that_holds(policy):
    costs = []
    for method in ("none", "uniform", "none"):
        policy.configure(compress=method, keep=32)
        policy.reset(TASK)
        costs.append(policy.act(noise(0)).flags)
    assert costs[0] == costs[2]
    for name, share in (("flops", 1.0), ("visual_flops", 0.65)):
        assert costs[1][name] < share * costs[0][name]


def test_the_mini_has_a_few_million_parameters_and_64_tokens_a_camera(policy):
    assert 3e6 < sum(parameter.numel() for parameter in policy.model.parameters()) < 10e6
    assert policy.model.visual_tokens(torch.zeros(1, 2, 3, 128, 128)).shape[1] == 128


def test_the_bench_size_is_of_the_100m_class():
    from mllm.vla import VLA

    with torch.device("meta"):
        model = VLA(named_config("bench-100m"))
    assert 90e6 < sum(parameter.numel() for parameter in model.parameters()) < 130e6


def test_equal_seeds_give_equal_actions_and_others_do_not(policy):
    other, same = mini_policy(seed=1), mini_policy(seed=0)
    answers = []
    for each in (policy, same, other):
        each.reset(TASK)
        answers.append(np.stack([each.act(noise(seed)).action for seed in range(3)]))
    assert np.array_equal(answers[0], answers[1])
    assert not np.array_equal(answers[0], answers[2])


def test_an_answer_depends_on_nothing_that_came_before(policy):
    policy.reset(TASK)
    first = policy.act(noise(5)).action
    policy.act(noise(6))
    policy.reset("open the drawer")
    policy.warm_up()
    policy.reset(TASK)
    assert np.array_equal(policy.act(noise(5)).action, first)


def test_acting_before_a_reset_is_an_error_and_warming_up_is_not():
    policy = mini_policy(seed=0)
    policy.warm_up()
    with pytest.raises(PolicyError, match="call reset"):
        policy.act(make_example(policy.config))


@pytest.mark.parametrize("instruction", ["", "   ", "x" * 2001, None])
def test_an_instruction_must_say_something(policy, instruction):
    with pytest.raises(PolicyError, match="the instruction is"):
        policy.reset(instruction)


def test_an_instruction_longer_than_the_model_is_an_error_that_says_what_to_do(policy):
    policy.reset(TASK)
    with pytest.raises(PolicyError, match="and 128 visual tokens: the model has room for 505; shorten"):
        policy.reset("go " * 600)
    policy.act(noise(0))  # the episode that could not begin has not ended this one


def keep(policy, *kept, valid=None):
    """A policy with the same weights whose decoder keeps these places of the prompt, one list a layer from the second
    on; valid: of the last list.
    """

    def hook(state):
        if state.layer > len(kept):
            return None
        index = torch.tensor([kept[state.layer - 1]])
        return Kept(index, valid=None if valid is None or state.layer < len(kept) else torch.tensor([valid]))

    return VLAPolicy(policy.model, policy.tokenizer, hook=hook)


def test_an_answer_says_which_visual_tokens_the_decoder_kept(policy):
    policy.reset(TASK)
    assert policy.act(noise(0)).kept is None
    # The prompt: its first token, 128 visual tokens at 1 to 128, and 17 words.
    words = list(range(129, 146))
    once = keep(policy, [0, 1, 5, 7, 128, *words])
    once.reset(TASK)
    kept = once.act(noise(0)).kept
    assert kept.dtype == np.int64
    assert kept.tolist() == [0, 4, 6, 127]
    # A later choice counts what an earlier one left.
    twice = keep(policy, [0, 1, 5, 7, 128, *words], [0, 2, 4, *range(5, 22)])
    twice.reset(TASK)
    assert twice.act(noise(0)).kept.tolist() == [4, 127]
    # Rows that only fill up are not kept.
    filled = keep(policy, [0, 3, 9, 9, *words], valid=[True, True, True, False, *[True] * 17])
    filled.reset(TASK)
    assert filled.act(noise(0)).kept.tolist() == [2, 8]


def test_in_a_batch_every_sample_has_its_own_kept_tokens(policy):
    def hook(state):
        if state.layer != 2:
            return None
        rest = state.hidden.shape[1] - 129
        first = torch.tensor([[0, 1, 2], [0, 8, 9]])
        return Kept(torch.cat((first, torch.arange(129, 129 + rest).expand(2, -1)), 1))

    batched = VLAPolicy(policy.model, policy.tokenizer, hook=hook)
    steps = batched.act_batch([batched.begin(TASK), batched.begin("go there")], [noise(0), noise(1)])
    assert [step.kept.tolist() for step in steps] == [[0, 1], [7, 8]]


def test_a_checkpoint_of_the_mini_answers_as_the_mini_does(policy, tmp_path):
    from mllm.checkpoint import save_checkpoint

    save_checkpoint(tmp_path, policy.model, policy.tokenizer)
    policy.reset(TASK)
    expected = policy.act(noise(1)).action
    for loaded in (make_policy("mini", checkpoint=str(tmp_path)), make_policy(str(tmp_path), threads=None)):
        loaded.reset(TASK)
        assert np.array_equal(loaded.act(noise(1)).action, expected)
    with pytest.raises(PolicyError, match="no policy is called '/nowhere', and there is no folder"):
        make_policy("/nowhere")


def test_statistics_are_chosen_by_name_or_are_the_only_ones(policy):
    with pytest.raises(PolicyError, match="no action statistics called 'bridge'; choose one of: none"):
        type(policy)(policy.model, policy.tokenizer, statistics="bridge")


def test_words_have_ids_of_their_own_and_others_share_one():
    tokenizer = WordTokenizer()
    ids = tokenizer.prompt("Pick up the BOWL, zebra!")
    assert ids[0] == 1
    assert ids[-1] == 2
    assert len(set(ids)) == 6
    assert tokenizer.size == len(LIBERO_WORDS) + 3 <= named_config("mini").action_ids[0]


def test_openvlas_prompt_is_the_published_one():
    assert openvla_prompt("Pick Up") == "In: What action should the robot take to pick up?\nOut:"


@pytest.mark.parametrize("ends_with_it", [True, False])
def test_the_lone_space_before_the_action_is_there_exactly_once(tmp_path, ends_with_it):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["In:", "What", "action", "should", "the", "robot", "take", "to", "go?", "Out:"]
    vocabulary = {"<unk>": 0, "<s>": 1, **{word: index + 2 for index, word in enumerate(words)}}
    if ends_with_it:
        vocabulary["Out:"] = BEFORE_ACTION
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.save(str(tmp_path / "tokenizer.json"))
    ids = LlamaTokenizer(tmp_path / "tokenizer.json").prompt("Go")
    assert ids[:3] == [1, 2, 3]
    assert ids.count(BEFORE_ACTION) == 1
    assert ids[-1] == BEFORE_ACTION
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PolicyError, match="is no tokenizer"):
        LlamaTokenizer(tmp_path / "tokenizer.json")


def test_torchs_threads_wait_without_spinning_unless_the_environment_says_otherwise():
    for given, expected in ({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE"):
        environment = {**{k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}, **given}
        result = subprocess.run(
            [sys.executable, "-c", "import mllm.kernels"],
            env={**environment, "OMP_DISPLAY_ENV": "TRUE"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"OMP_WAIT_POLICY = '{expected}'" in result.stderr


def test_the_interface_is_imported_without_torch():
    code = (
        "import sys, mllm.policy, mllm.config, mllm.actions; "
        "print([m for m in ('torch', 'timm', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def chunked():
    statistics = ActionStatistics((-1.0,) * 5, (1.0,) * 5)
    config = replace(
        named_config("mini"),
        decoding="slots",
        chunk=4,
        execute=3,
        head="regression",
        proprio=("eef_pos", "gripper_qpos"),
        proprio_statistics=statistics,
        render={"renderer": "fast", "image_size": 128},
    )
    return VLAPolicy(init_random(VLA(config), 0), WordTokenizer())


def with_proprio(seed):
    generator = np.random.default_rng(seed)
    proprio = {"eef_pos": generator.uniform(-1, 1, 3), "gripper_qpos": generator.uniform(-1, 1, 2)}
    return replace(noise(seed), proprio=proprio)


def test_a_chunk_is_carried_out_before_the_model_looks_again(chunked):
    chunked.reset(TASK)
    steps = [chunked.act(with_proprio(seed)) for seed in range(4)]
    assert [step.flags["chunk_step"] for step in steps] == [0, 1, 2, 0]
    assert [bool(step.timing) for step in steps] == [True, False, False, True]
    texts = [chunked.tokenizer.prompt(TASK)]
    observation = with_proprio(0)
    pixels = torch.from_numpy(chunked.preprocess(observation.images))[None]
    proprio = torch.from_numpy(np.concatenate(list(observation.proprio.values())))[None].float()
    answer = chunked.decoder.generate(pixels, texts, proprio)[0].clamp(-1, 1)
    np.testing.assert_allclose(np.stack([step.action for step in steps[:3]]), answer[:3].numpy(), atol=1e-6)


def test_several_episodes_at_once_get_the_answers_that_each_gets_alone(chunked):
    words = [TASK, "open the drawer", "pick up the milk"]
    alone = []
    for number, instruction in enumerate(words):
        chunked.reset(instruction)
        alone.append([chunked.act(with_proprio(10 * number + step)).action for step in range(5)])
    episodes = [chunked.begin(instruction) for instruction in words]
    chunked.act_batch(episodes[:1], [with_proprio(0)])  # the first is a step ahead, so that looks and chunks mix
    together = [
        [step.action for step in chunked.act_batch(episodes, [with_proprio(s + (i == 0) + 10 * i) for i in range(3)])]
        for s in range(4)
    ]
    for number in range(3):
        ahead = int(number == 0)
        for step in range(4):
            np.testing.assert_allclose(together[step][number], alone[number][step + ahead], atol=1e-5)


def test_the_answer_depends_on_proprioception_which_must_be_there(chunked):
    chunked.reset(TASK)
    seen = with_proprio(0)
    first = chunked.act(seen).action
    chunked.reset(TASK)
    assert not np.array_equal(chunked.act(replace(seen, proprio=with_proprio(1).proprio)).action, first)
    chunked.reset(TASK)
    with pytest.raises(PolicyError, match="lacks proprioception 'gripper_qpos'; it has eef_pos"):
        chunked.act(replace(seen, proprio={"eef_pos": np.zeros(3)}))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_proprioception_that_is_not_finite_is_refused_before_the_model_runs(chunked, value):
    chunked.reset(TASK)
    seen = with_proprio(0)
    with pytest.raises(PolicyError, match=r"proprioception 'gripper_qpos' is not finite"):
        chunked.act(replace(seen, proprio={**seen.proprio, "gripper_qpos": np.array([0.04, value])}))
    assert chunked.act(seen).flags["chunk_step"] == 0


def test_a_chunked_checkpoint_says_all_that_it_was_trained_with(chunked, tmp_path):
    from mllm.checkpoint import save_checkpoint

    save_checkpoint(tmp_path, chunked.model, chunked.tokenizer)
    loaded = make_policy("mini", checkpoint=str(tmp_path))
    assert loaded.config == chunked.config
    assert loaded.render == {"renderer": "fast", "image_size": 128}
    for each in (chunked, loaded):
        each.reset(TASK)
    assert np.array_equal(loaded.act(with_proprio(2)).action, chunked.act(with_proprio(2)).action)
    with pytest.raises(PolicyError, match="execute is 9: it must be from 1 to the model's chunk of 4"):
        make_policy("mini", checkpoint=str(tmp_path), execute=9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "regression", "decoding": "full"}, "it must be 'slots'"),
        ({"head": "diffusion"}, "it must be 'slots'"),
        ({"decoding": "slots", "chunk": 4, "execute": 5}, "execute is 5"),
        ({"proprio": ("eef_pos",)}, "one needs the other"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(change, message):
    with pytest.raises(PolicyError, match=message):
        replace(named_config("mini"), **change)
