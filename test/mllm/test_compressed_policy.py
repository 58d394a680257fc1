"""The shipped policies on images of LIBERO, with and without compression.

observations.webp: two rows of ten observations, one of each task; a row is their agentviews above their wrist views.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mllm.compress import METHODS, CompressConfig  # noqa: E402
from mllm.config import named_config  # noqa: E402
from mllm.contribution import information_contribution  # noqa: E402
from mllm.engine import JacobiLoop  # noqa: E402
from mllm.errors import PolicyError  # noqa: E402
from mllm.generate import ActionDecoder, compressor  # noqa: E402
from mllm.policy import PROPRIO_SIZES, Observation, make_policy  # noqa: E402
from mllm.selection import top  # noqa: E402
from mllm.tokenizer import WordTokenizer  # noqa: E402
from mllm.vla import VLA, init_random  # noqa: E402
from mllm.vla_policy import VLAPolicy  # noqa: E402

IMAGES, SIDE = Path(__file__).parent / "observations.webp", 128
CHOOSING = METHODS[1:]
INSTRUCTIONS = ("pick up the milk and place it in the basket", "pick up the bowl", "open the drawer")


@pytest.fixture(autouse=True)
def _one_thread(_two_threads_and_a_seed):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def observations():
    sheet = cv2.imread(str(IMAGES))[..., ::-1]
    rng, seen = np.random.default_rng(0), []
    for row in range(0, len(sheet), 2 * SIDE):
        for column in range(0, sheet.shape[1], SIDE):
            views = sheet[row : row + 2 * SIDE, column : column + SIDE]
            images = {"agentview": views[:SIDE], "robot0_eye_in_hand": views[SIDE:]}
            seen.append(Observation(images, {name: rng.normal(size=size) for name, size in PROPRIO_SIZES.items()}))
    return seen


@pytest.fixture(scope="module")
def shipped():
    return make_policy("mini")


@pytest.fixture(scope="module")
def causal():
    return make_policy("mini-ar")


@pytest.fixture(scope="module")
def full():
    """Every position sees every other, tokens of two actions in one pass."""
    config = replace(named_config("mini"), decoding="full", chunk=2)
    config = replace(config, decoder=replace(config.decoder, num_hidden_layers=3))
    return VLAPolicy(init_random(VLA(config), 0), WordTokenizer())


@pytest.fixture(params=["shipped", "causal", "full"])
def policy(request):
    policy = request.getfixturevalue(request.param)
    yield policy
    policy.compress = CompressConfig()


def answers(policy, observations):
    """The first action to each, and the steps."""
    steps = []
    for number, observation in enumerate(observations):
        policy.reset(INSTRUCTIONS[number % len(INSTRUCTIONS)])
        steps.append(policy.act(observation))
    return np.stack([step.action for step in steps]), steps


def last_states(policy, observations):
    """What the decoder's head saw: random weights choose few different tokens."""
    seen = []
    head = policy.model.language_model.model.norm.register_forward_hook(lambda *call: seen.append(call[2].clone()))
    _, steps = answers(policy, observations)
    head.remove()
    return torch.cat([state.flatten() for state in seen]), steps


def test_keeping_all_changes_no_bit_of_any_answer(policy, observations):
    expected, _ = last_states(policy, observations[:2])
    for method in CHOOSING:
        policy.compress = CompressConfig(method, keep=128)
        states, steps = last_states(policy, observations[:2])
        assert torch.equal(states, expected), method
        assert all(np.array_equal(step.kept, np.arange(128)) for step in steps)


@pytest.mark.parametrize("method", CHOOSING)
def test_a_compressed_prompt_gives_other_states_and_says_what_it_kept(policy, observations, method):
    expected, _ = last_states(policy, observations[:2])
    policy.compress = CompressConfig(method, keep=64)
    states, steps = last_states(policy, observations[:2])
    assert not torch.equal(states, expected)
    for step in steps:
        assert step.kept.dtype == np.int64
        assert len(step.kept) == 64
        assert (np.diff(step.kept) > 0).all()
        assert 0 <= step.kept[0] <= step.kept[-1] < 128
        assert list(step.timing) == ["preprocess", "vision", "select", "prefill", "decode"]
        assert min(step.timing.values()) > 0
        assert (step.merged is None) == (method != "tokencarve")
        if step.merged is not None:
            assert step.merged.shape == (32, 2)
            assert not set(step.merged[:, 0]) & set(step.kept)
            assert set(step.merged[:, 1]) <= set(step.kept)


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("method", ["flashvla", "tokencarve"])
def test_a_batch_gets_the_answers_that_each_gets_alone(policy, observations, method, trim):
    """With instructions of several lengths, so that prompts are padded."""
    policy.compress = CompressConfig(method, keep=64, trim=trim)
    alone, steps = answers(policy, observations[:3])
    together = policy.act_batch([policy.begin(instruction) for instruction in INSTRUCTIONS], observations[:3])
    for one, other in zip(steps, together, strict=True):
        assert np.array_equal(one.kept, other.kept)
    np.testing.assert_allclose(np.stack([step.action for step in together]), alone, atol=1e-4)


def layer_2(policy, observations):
    """The visual tokens after the second layer, (n, 128, d)."""
    states = []

    def hook(state):
        if state.layer == 2:
            states.append(state.hidden[:, 1:129].clone())

    watched = VLAPolicy(policy.model, policy.tokenizer, hook=hook)
    answers(watched, observations)
    return torch.cat(states)


@pytest.mark.parametrize("name", ["shipped", "causal"])
def test_of_the_shipped_models_the_kept_sets_are_those_of_the_full_decomposition(name, observations, request):
    shipped = request.getfixturevalue(name)
    tokens = layer_2(shipped, observations)
    left, sizes, _ = torch.linalg.svd(tokens.double(), full_matrices=True)
    reference = (left * sizes[:, None]).abs().sum(-1)
    scores = information_contribution(tokens)
    assert torch.allclose(scores, reference, rtol=1e-6)
    for keep in (16, 48, 64, 80, 96, 112):
        assert torch.equal(top(scores, keep), top(reference, keep))
    shipped.compress = CompressConfig("flashvla", keep=80)
    _, steps = answers(shipped, observations)
    shipped.compress = CompressConfig()
    assert np.array_equal(np.stack([step.kept for step in steps]), top(reference, 80).numpy())


def test_a_change_between_two_actions_holds_from_the_next_frame_that_the_model_looks_at(shipped, observations):
    shipped.reset(INSTRUCTIONS[0])
    steps = [shipped.act(observations[0])]
    shipped.compress = CompressConfig("fastv", keep=32)
    steps += [shipped.act(observations[0]) for _ in range(shipped.execute)]
    shipped.compress = CompressConfig()
    assert [step.flags["chunk_step"] for step in steps] == [*range(shipped.execute), 0]
    assert all(step.kept is None for step in steps[:-1])
    assert len(steps[-1].kept) == 32


def test_a_change_that_the_model_cannot_follow_is_refused_and_changes_nothing(shipped, observations):
    shipped.compress = before = CompressConfig("uniform", keep=60)
    expected, _ = answers(shipped, observations[:1])
    for wrong, message in (
        (CompressConfig("flashvla", keep=129), "keep is 129"),
        (CompressConfig("fastv", layer=6), "6"),
    ):
        with pytest.raises(PolicyError, match=message):
            shipped.compress = wrong
        assert shipped.compress == before
        assert np.array_equal(answers(shipped, observations[:1])[0], expected)
    shipped.compress = CompressConfig()


def test_a_policy_is_configured_while_it_acts_and_what_is_not_named_stays(shipped):
    shipped.configure(compress='{"method": "flashvla", "centre": true}', keep=64)
    assert shipped.compress == CompressConfig("flashvla", keep=64, centre=True)
    shipped.configure(keep=32)
    shipped.configure(compress="tokencarve")
    assert shipped.compress == CompressConfig("tokencarve", keep=32, centre=True)
    for wrong in ({"compress": "best"}, {"compress": "{]"}, {"keep": 500}):
        with pytest.raises(PolicyError):
            shipped.configure(**wrong)
    assert shipped.compress == CompressConfig("tokencarve", keep=32, centre=True)
    shipped.compress = CompressConfig()


def test_policy_options_reach_the_decoder():
    assert make_policy("mini", seed=0).compress == CompressConfig()
    assert make_policy("mini", seed=0, compress="tokencarve", keep=64).compress == CompressConfig("tokencarve", 64)
    chosen = {"method": "flashvla", "keep": 32, "layer": 3, "centre": True}
    assert make_policy("mini", compress=chosen).compress == CompressConfig("flashvla", 32, layer=3, centre=True)
    with pytest.raises(PolicyError, match="keep is 500: there are 128 visual tokens"):
        make_policy("mini", seed=0, compress="flashvla", keep=500)
    with pytest.raises(PolicyError, match="method is 'best'"):
        make_policy("mini", compress="best")


def test_a_hook_beside_a_configuration_is_refused(causal):
    with pytest.raises(PolicyError, match="give one of them"):
        VLAPolicy(causal.model, causal.tokenizer, hook=lambda state: None, compress=CompressConfig())


@torch.inference_mode()
def test_the_ragged_cache_keeps_what_the_trimmed_one_cuts(causal, observations):
    used = {}
    for trim in (True, False):
        causal.compress = CompressConfig("flashvla", keep=80, trim=trim)
        answers(causal, observations[:1])
        assert isinstance(causal.decoder._loop, JacobiLoop)
        used[trim] = causal.decoder._loop.cache.used
    causal.compress = CompressConfig()
    # One at the start, the cameras, one of proprioception, and the words; the ids of a prompt have its start too.
    prompt = 1 + 128 + 1 + len(causal.tokenizer.prompt(INSTRUCTIONS[0])) - 1
    assert used[True] == [prompt - 48] * 6
    assert used[False] == [prompt] * 2 + [prompt - 48] * 4


@pytest.mark.parametrize("method", CHOOSING)
@torch.inference_mode()
def test_selection_never_looks_at_a_value(method):
    """A tensor on the meta device has none: whatever copied one to the host, or made a shape of one, would fail."""
    config = replace(named_config("mini"), decoding="slots")
    with torch.device("meta"):
        model = VLA(config).eval()
        decoder = ActionDecoder(model)
        decoder.hook = compressor(model, CompressConfig(method, keep=64, per_camera=True))
        hidden, positions = torch.empty(2, 140, 192), torch.arange(140)[None]
        assert decoder.decode(decoder.prefill(hidden, positions, None)).shape == (2, 7)
