"""Reuse around policies: small models with random weights, and a third party's that knows nothing of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from mllm.actions import ActionStatistics
from mllm.config import DecoderConfig, ImageConfig, TowerConfig, VLAConfig
from mllm.errors import PolicyError
from mllm.policy import ActionSpec, ActionStep, Observation, Policy, TokenLayout, Tunable, make_policy
from mllm.reuse import ReuseConfig
from mllm.reuse_policy import with_reuse
from mllm.tokenizer import WordTokenizer
from mllm.vla import VLA, init_random
from mllm.vla_policy import VLAPolicy

TASK = "pick up the bowl"
# Reuses wherever it may: what random weights say turns by any angle.
ALWAYS = ReuseConfig("gated", max_angle=180, max_surprise=255)
CONFIG = VLAConfig(
    towers=(TowerConfig("conv-vit", 32, 32, 1, 1, 64),),
    decoder=DecoderConfig(32, 64, 2, 2, 2, 512, 64),
    cameras=("front", "wrist"),
    vocab_padding=0,
    images=ImageConfig(mirror=False, jpeg=False, resize="area", centre_crop=False),
    gripper="command",
    decoding="slots",
    chunk=6,
    execute=2,
    head="regression",
    proprio=("eef_pos",),
    proprio_statistics=ActionStatistics((-1.0,) * 3, (1.0,) * 3),
)


class Counted(VLAPolicy):
    """Counts how many observations the model was run on."""

    looked = 0

    def _infer(self, texts, observations):
        self.looked += len(observations)
        return super()._infer(texts, observations)


def chunked() -> Counted:
    model = init_random(VLA(CONFIG), 0)
    return Counted(model, WordTokenizer())


def noise(seed: int) -> Observation:
    generator = np.random.default_rng(seed)
    images = {name: generator.integers(0, 256, (32, 32, 3), np.uint8) for name in CONFIG.cameras}
    return Observation(images, {"eef_pos": generator.uniform(-1, 1, 3)}, stamp=float(seed))


class ThirdParty:
    """Answers the time, and keeps tokens 0 and 1 of 4. It knows nothing of reuse."""

    action_spec = ActionSpec()
    layout = TokenLayout(("front",), 2, 2)
    render = {"renderer": "fast"}  # noqa: RUF012

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.gain = 0.01

    def warm_up(self) -> None:
        self.calls.append("warm up")

    def reset(self, instruction: str) -> None:
        self.calls.append(instruction)

    def clear(self) -> None:
        self.calls.append("clear")

    def act(self, observation: Observation) -> ActionStep:
        self.calls.append("act")
        pose = [0.5, self.gain * observation.stamp, 0, 0, 0, 0]
        return ActionStep(np.array([*pose, -1], np.float32), {"model": 0.01}, {"mood": "good"}, np.array([0, 1]))

    def configure(self, **options) -> None:
        if set(options) - {"gain"} or not options["gain"] >= 0:
            raise PolicyError(f"cannot change {options}")
        self.gain = options["gain"]


def answers(policy: Policy, seeds: range) -> list[ActionStep]:
    policy.reset(TASK)
    return [policy.act(noise(seed)) for seed in seeds]


def row(steps: list[ActionStep]) -> str:
    return "".join("r" if step.flags.get("reuse") else "c" for step in steps)


def test_a_third_party_s_policy_is_not_called_on_a_reuse():
    inner = ThirdParty()
    steps = answers(with_reuse(inner, ReuseConfig("paper")), range(7))
    assert row(steps) == "ccrccrc"
    assert inner.calls == [TASK, *["act"] * 5]
    assert np.array_equal(steps[2].action, steps[1].action)
    assert steps[2].kept is None
    assert set(steps[2].timing) == {"reuse"}
    assert steps[2].flags == {
        "reuse": True,
        "reuse_reason": "reused",
        "reuse_angle": pytest.approx(1.1457, abs=1e-3),
        "reuse_overlap": 1.0,
    }
    assert set(steps[3].timing) == {"model", "reuse"}
    assert (steps[3].flags["mood"], steps[3].flags["reuse_reason"]) == ("good", "computed-cap")


def test_off_is_the_policy_s_own_answer_to_the_bit():
    plain = answers(chunked(), range(7))
    off = answers(with_reuse(chunked(), ReuseConfig()), range(7))
    for mine, theirs in zip(off, plain, strict=True):
        assert np.array_equal(mine.action, theirs.action)
        assert (mine.flags, set(mine.timing)) == (theirs.flags, set(theirs.timing))


def test_a_chunked_model_needs_no_image_until_it_looks_again_but_the_gate_sees_every_frame():
    plain = answers(with_reuse(chunked(), ReuseConfig()), range(8))
    assert [step.looks for step in plain] == [step.left == 0 for step in plain]
    assert {step.looks for step in plain} == {True, False}
    assert all(step.looks for step in answers(with_reuse(chunked(), ReuseConfig("gated")), range(8)))


def test_a_chunked_model_goes_on_with_its_own_plan_and_is_not_run():
    inner = chunked()
    steps = answers(with_reuse(inner, ALWAYS), range(10))
    assert row(steps) == "ccccrrcccc"
    assert inner.looked == 4
    whole = answers(inner, range(2, 3))[0].plan  # at step 2 it looked for the second time
    assert np.array_equal(np.stack([step.action for step in steps[2:6]]), whole[:4])
    assert ["reuse_reason" in step.flags for step in steps] == [True, False] * 5


def test_a_changed_frame_stops_a_reuse_that_is_under_way():
    still = noise(0)
    moved = replace(still, images={**still.images, "wrist": 255 - still.images["wrist"]})
    inner = chunked()
    policy = with_reuse(inner, ReuseConfig("gated", max_angle=180))
    policy.reset(TASK)
    steps = [policy.act(observation) for observation in [still] * 5 + [moved]]
    assert row(steps) == "ccccrc"
    assert steps[-1].flags["reuse_reason"] == "computed-frame-changed"
    inner.reset(TASK)
    assert np.array_equal(steps[-1].action, inner.act(moved).action)
    # The paper's rule does not look.
    blind = with_reuse(inner, ReuseConfig("paper", max_angle=180))
    blind.reset(TASK)
    assert row([blind.act(observation) for observation in [still] * 5 + [moved]]) == "ccccrr"


@pytest.mark.parametrize("mode", ["paper", "gated"])
def test_several_episodes_at_once_are_reused_as_each_is_alone(mode):
    config = ReuseConfig(mode, max_angle=180, max_surprise=90)
    policy = with_reuse(chunked(), config)
    alone = []
    for number in range(3):
        policy.reset(TASK)
        alone.append([policy.act(noise(number * 100 + step)) for step in range(12)])
    assert all("r" in row(steps) for steps in alone)
    episodes = [policy.begin(TASK) for _ in range(3)]
    policy.act_batch(episodes[:1], [noise(0)])  # the first is a step ahead, so that looks, plans and reuses mix
    for step in range(11):
        ahead = [step + (number == 0) for number in range(3)]
        together = policy.act_batch(episodes, [noise(number * 100 + ahead[number]) for number in range(3)])
        for number, found in enumerate(together):
            expected = alone[number][ahead[number]]
            np.testing.assert_allclose(found.action, expected.action, atol=1e-5)
            assert found.flags.get("reuse") == expected.flags.get("reuse")
            assert found.flags.get("reuse_reason") == expected.flags.get("reuse_reason")


def test_when_all_episodes_are_reused_the_policy_is_not_asked():
    inner = chunked()
    policy = with_reuse(inner, ALWAYS)
    episodes = [policy.begin(TASK), policy.begin("open the drawer")]
    for step in range(4):
        policy.act_batch(episodes, [noise(step), noise(step)])
    looked = inner.looked
    steps = policy.act_batch(episodes, [noise(4), noise(5)])
    assert (row(steps), inner.looked) == ("rr", looked)


@pytest.mark.parametrize(
    "forget",
    [
        lambda policy: policy.clear(),  # a command was clamped
        lambda policy: policy.reset(TASK),
        lambda policy: policy.reset("open the drawer"),
        lambda policy: (policy.configure(reuse="off"), policy.configure(reuse="paper")),
    ],
)
def test_nothing_is_reused_for_two_looks_after_what_makes_it_forget(forget):
    for before in range(1, 6):
        policy = with_reuse(ThirdParty(), ReuseConfig("paper"))
        policy.reset(TASK)
        for step in range(before):
            policy.act(noise(step))
        forget(policy)
        assert row([policy.act(noise(before + step)) for step in range(3)]) == "ccr"


def test_a_clamp_ends_a_reuse_of_a_plan_and_the_model_looks_at_once():
    inner = chunked()
    policy = with_reuse(inner, ALWAYS)
    answers(policy, range(5))
    policy.clear()
    looked = inner.looked
    assert policy.act(noise(5)).flags["reuse_reason"] == "computed-first-steps"
    assert inner.looked == looked + 1


def test_a_clamp_in_the_middle_of_a_computed_plan_leaves_the_next_look_where_it_was():
    policy = with_reuse(chunked(), ALWAYS)
    answers(policy, range(3))
    policy.clear()
    steps = [policy.act(noise(seed)) for seed in range(3, 10)]
    assert ["reuse_reason" in step.flags for step in steps] == [False, True, False, True, False, True, False]
    assert row(steps) == "cccccrr"


def test_options_change_while_it_acts_or_not_at_all():
    inner = ThirdParty()
    policy = with_reuse(inner, ReuseConfig())
    assert isinstance(policy, Tunable)
    assert row(answers(policy, range(3))) == "ccc"
    policy.configure(reuse='{"mode": "paper", "max_angle": 5}', gain=0.02)
    assert (policy.reuse, inner.gain) == (ReuseConfig("paper", max_angle=5), 0.02)
    assert row([policy.act(noise(seed)) for seed in range(3)]) == "ccr"
    for wrong in ({"reuse": "often", "gain": 0.5}, {"reuse": "off", "gain": -1}, {"colour": 1, "reuse": "off"}):
        with pytest.raises(PolicyError):
            policy.configure(**wrong)
        assert (policy.reuse, inner.gain) == (ReuseConfig("paper", max_angle=5), 0.02)
    with pytest.raises(PolicyError, match="cannot change execute while it acts"):
        with_reuse(make_policy("hold"), ReuseConfig()).configure(execute=1)


def test_episodes_under_way_follow_a_change_too():
    policy = with_reuse(chunked(), ALWAYS)
    episodes = [policy.begin(TASK)]
    for step in range(5):
        steps = policy.act_batch(episodes, [noise(step)])
    assert row(steps) == "r"
    policy.configure(reuse="off")
    assert row([policy.act_batch(episodes, [noise(step)])[0] for step in range(5, 12)]) == "ccccccc"


@pytest.mark.parametrize("options", [{"keep": 4}, {"keep": 4, "reuse": ALWAYS}])
def test_episodes_under_way_reuse_nothing_of_what_the_policy_said_before_a_change_of_its_own(options):
    policy = with_reuse(chunked(), ALWAYS)
    episodes = [policy.begin(TASK)]
    for step in range(5):
        steps = policy.act_batch(episodes, [noise(step)])
    assert row(steps) == "r"
    policy.configure(**options)
    assert policy.reuse == ALWAYS
    steps = [policy.act_batch(episodes, [noise(step)])[0] for step in range(5, 11)]
    assert row(steps) == "ccccrr"
    assert steps[0].flags["reuse_reason"] == "computed-first-steps"


def test_what_else_a_policy_has_stays_reachable():
    inner = ThirdParty()
    policy = with_reuse(inner, ReuseConfig("paper"))
    assert isinstance(policy, Policy)
    policy.warm_up()
    policy.clear()
    assert inner.calls == ["warm up", "clear"]
    assert (policy.render, policy.layout) == (inner.render, inner.layout)
    assert not hasattr(policy, "begin")
    assert not hasattr(policy, "provenance")


def test_any_policy_is_made_with_reuse():
    policy = make_policy("hold", reuse="paper")
    assert row(answers(policy, range(4))) == "ccrc"
    mini = make_policy("mini", seed=0, reuse={"mode": "gated", "max_consecutive": 2})
    assert mini.reuse == ReuseConfig("gated", max_consecutive=2)
    assert mini.layout == TokenLayout(("agentview", "robot0_eye_in_hand"), 8, 8)
    with pytest.raises(PolicyError, match="choose one of off, paper, gated"):
        make_policy("hold", reuse="maybe")
