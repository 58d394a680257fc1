"""The rule of action reuse, against traces made by hand and against the paper's words taken literally."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm.errors import PolicyError
from mllm.policy import ActionStep, TokenLayout
from mllm.reuse import ActionReuse, ReuseConfig, angle_between, overlap_of

OPEN, CLOSE = -1.0, 1.0
PAPER = ReuseConfig("paper", max_angle=10, min_overlap=0.6)


def action(degrees: float, gripper: float = OPEN, length: float = 0.5) -> np.ndarray:
    pose = [length * math.cos(math.radians(degrees)), length * math.sin(math.radians(degrees)), 0, 0, 0, 0]
    return np.array([*pose, gripper], np.float32)


def reasons(reuse: ActionReuse, steps: list[ActionStep]) -> list[str]:
    """What is decided before each step, where the policy would answer `steps`."""
    found = []
    for step in steps:
        decision, again = reuse.decide({})
        assert decision is not None
        found.append(decision.reason.value.removeprefix("computed-"))
        if again is None:
            reuse.computed(step)
    return found


def trace(*steps: tuple) -> list[ActionStep]:
    """(degrees, gripper, kept tokens) each; kept None is all."""
    return [
        ActionStep(action(degrees, gripper), kept=None if kept is None else np.array(kept))
        for degrees, gripper, kept in steps
    ]


TEN = list(range(10))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        # Stable: two looks, one reuse, for ever.
        ([(0, OPEN, TEN)] * 7, ["first-steps", "first-steps", "reused", "cap", "cap", "reused", "cap"]),
        # All tokens kept: phi is 1.
        ([(0, OPEN, None)] * 3, ["first-steps", "first-steps", "reused"]),
        # The direction turns by 20 degrees, then stays.
        ([(0, OPEN, TEN), *[(20, OPEN, TEN)] * 3], ["first-steps", "first-steps", "angle", "reused"]),
        # Just below the threshold, and just above it.
        ([(0, OPEN, TEN), *[(9.9, OPEN, TEN)] * 2], ["first-steps", "first-steps", "reused"]),
        ([(0, OPEN, TEN), *[(10.1, OPEN, TEN)] * 2], ["first-steps", "first-steps", "angle"]),
        # The gripper closes between the two.
        ([(0, OPEN, TEN), *[(0, CLOSE, TEN)] * 3], ["first-steps", "first-steps", "gripper", "reused"]),
        # 7 of 10 tokens stay; 6 of 10 are not more than 0.6.
        ([(0, OPEN, TEN), *[(0, OPEN, [*TEN[:7], 20, 21, 22])] * 2], ["first-steps", "first-steps", "reused"]),
        ([(0, OPEN, TEN), *[(0, OPEN, [*TEN[:6], 19, 20, 21, 22])] * 2], ["first-steps", "first-steps", "tokens"]),
        # The share is of the newer set: 5 of 10 against 5 of 5.
        ([(0, OPEN, TEN[:5]), *[(0, OPEN, TEN)] * 2], ["first-steps", "first-steps", "tokens"]),
        ([(0, OPEN, TEN), *[(0, OPEN, TEN[:5])] * 2], ["first-steps", "first-steps", "reused"]),
        # Selection was switched on in between.
        ([(0, OPEN, None), *[(0, OPEN, TEN)] * 3], ["first-steps", "first-steps", "tokens", "reused"]),
    ],
)
def test_flashtrigger_on_traces_made_by_hand(steps, expected):
    assert reasons(ActionReuse(PAPER), trace(*steps)) == expected


def test_a_reuse_repeats_the_last_action_and_says_what_it_was_decided_from():
    reuse = ActionReuse(PAPER)
    for degrees in (0, 4):
        assert reuse.decide({})[1] is None
        reuse.computed(ActionStep(action(degrees), kept=np.array(TEN)))
    decision, again = reuse.decide({})
    assert np.array_equal(again, action(4))
    assert decision.flags == {
        "reuse_reason": "reused",
        "reuse_angle": pytest.approx(4, abs=1e-3),
        "reuse_overlap": 1.0,
    }


def test_more_reuse_in_a_row_and_less_between_is_what_the_gated_mode_may():
    stable = trace(*[(0, OPEN, None)] * 8)
    gated = ReuseConfig("gated", max_consecutive=2, max_surprise=255)
    images = {"front": np.zeros((64, 64, 3), np.uint8)}

    def pattern(config):
        reuse, found = ActionReuse(config), ""
        for step in stable:
            again = reuse.decide(images)[1]
            found += "c" if again is None else "r"
            if again is None:
                reuse.computed(step)
        return found

    assert pattern(gated) == "ccrrccrr"
    assert pattern(ReuseConfig("gated", computed_between=1)) == "ccrcrcrc"


# ---------------------------------------------------------------- plans of several actions


def plan(*degrees: float, left: int, gripper: float = OPEN) -> ActionStep:
    actions = np.stack([action(value, gripper) for value in degrees])
    return ActionStep(actions[0], plan=actions, left=left)


def play(reuse: ActionReuse, looks: list[ActionStep], steps: int) -> list[tuple[str, float]]:
    """(reason or "", direction in degrees) of each step of a policy that answers `looks` one after the other."""
    found, queue, waiting = [], [], list(looks)
    for _ in range(steps):
        decision, again = reuse.decide({})
        if again is None:
            if not queue:
                look = waiting.pop(0)
                queue = [ActionStep(a, left=look.left - i) for i, a in enumerate(look.plan[: look.left + 1])]
                queue[0] = look
            step = queue.pop(0)
            reuse.computed(step)
            again = step.action
        reason = "" if decision is None else decision.reason.value.removeprefix("computed-")
        found.append((reason, round(math.degrees(math.atan2(again[1], again[0])))))
    return found


def test_a_plan_is_gone_on_with_where_the_next_one_agreed_with_it():
    first, second = plan(0, 10, 20, 30, left=1), plan(21, 31, 41, 51, left=1)
    played = play(ActionReuse(PAPER), [first, second, first], 8)
    assert played == [
        *[("first-steps", 0), ("", 10), ("first-steps", 21), ("", 31)],
        *[("reused", 41), ("", 51), ("cap", 0), ("", 10)],
    ]


def test_the_angle_of_plans_is_between_what_was_foreseen_and_what_was_said():
    # The actions carried out turn by 20 degrees, as foreseen: stable. They stay where a turn was foreseen: not.
    turning, straight = plan(0, 0, 20, 20, left=1), plan(20, 20, 20, 20, left=1)
    assert play(ActionReuse(PAPER), [turning, straight], 5)[-1] == ("reused", 20)
    assert play(ActionReuse(PAPER), [turning, plan(0, 0, 0, 0, left=1), straight], 5)[-1] == ("angle", 20)


def test_a_plan_without_an_action_left_and_one_whose_rest_moves_the_gripper_are_not_reused():
    used_up = [plan(0, 0, left=1)] * 3
    assert play(ActionReuse(PAPER), used_up, 5)[-1] == ("plan-end", 0)
    closing = plan(0, 0, 0, 0, left=1)
    closing.plan[3, 6] = CLOSE
    assert play(ActionReuse(PAPER), [plan(0, 0, 0, 0, left=1), closing, closing], 5)[-1] == ("gripper", 0)


def test_after_a_change_of_the_gripper_that_was_foreseen_a_plan_goes_on():
    commands = [OPEN, OPEN, OPEN, CLOSE, CLOSE, CLOSE]

    def look(first: int) -> ActionStep:
        """Four actions, the first two carried out, of a gripper that closes in the fourth step of all."""
        step = plan(0, 0, 0, 0, left=1)
        step.plan[:, 6] = commands[first : first + 4] + [CLOSE] * (first - 2)
        return step

    assert play(ActionReuse(PAPER), [look(0), look(2), look(4)], 6)[4:] == [("reused", 0), ("", 0)]
    late = look(2)
    late.plan[1, 6] = OPEN  # not in the step that was foreseen
    assert play(ActionReuse(PAPER), [look(0), late, look(4)], 5)[-1] == ("gripper", 0)


def test_the_rest_of_a_plan_may_be_shorter_than_what_is_carried_out_at_a_time():
    looks = [plan(0, 0, 0, 0, 0, left=2), plan(0, 0, 0, 5, 6, left=2), plan(7, 7, 7, 7, 7, left=2)]
    played = play(ActionReuse(PAPER), looks, 9)
    assert played[6:] == [("reused", 5), ("", 6), ("cap", 7)]


def test_a_policy_with_chunks_that_does_not_show_its_plans_is_never_reused():
    looks = [plan(0, 0, left=1) for _ in range(3)]
    hidden = [ActionStep(look.action, left=1) for look in looks]
    reuse = ActionReuse(PAPER)
    for look in hidden:
        decision, again = reuse.decide({})
        assert again is None
        reuse.computed(look)
        assert reuse.decide({}) == (None, None)
        reuse.computed(ActionStep(look.action))
    assert decision.reason.value == "computed-plan-end"


@pytest.mark.parametrize("shape", [(7,), (1, 7), (4, 6)])
def test_a_plan_of_a_wrong_shape_is_an_error(shape):
    reuse = ActionReuse(PAPER)
    reuse.decide({})
    with pytest.raises(PolicyError, match="it must be \\(n, 7\\), n at least left \\+ 1 = 2"):
        reuse.computed(ActionStep(np.zeros(7, np.float32), plan=np.zeros(shape, np.float32), left=1))


# ---------------------------------------------------------------- properties


def literal(steps, cap, between):
    """The paper's rule with ours where it is silent, for single actions, written down as it reads."""
    memory, run, since, reused = [], 0, 0, []
    for forget, now, kept in steps:
        if forget:
            memory, run, since = [], 0, 0
        allowed = len(memory) == 2 and (run < cap if run else since >= between)
        if allowed:
            (a, i), (b, j) = memory
            cosine = np.dot(a[:6], b[:6]) / np.sqrt(np.dot(a[:6], a[:6]) * np.dot(b[:6], b[:6]))
            alpha = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
            allowed = bool(a[6] == b[6] and alpha < 10 and len(i & j) / len(j) > 0.6)
        if allowed:
            run, since = run + 1, 0
        else:
            memory, run, since = [*memory[-1:], (now.astype(np.float64), kept)], 0, since + 1
        reused.append(allowed)
    return reused


STEPS = st.lists(
    st.tuples(
        st.sampled_from([False] * 9 + [True]),
        st.builds(action, st.sampled_from([0, 3, 25]), st.sampled_from([OPEN] * 5 + [CLOSE]), st.floats(0.1, 1)),
        st.sampled_from([frozenset(range(10)), frozenset(range(2, 12)), frozenset(range(5, 15))]),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=150)
@given(steps=STEPS, cap=st.integers(1, 3), between=st.integers(1, 3))
def test_the_rule_is_the_paper_s_taken_literally_and_keeps_its_promises(steps, cap, between):
    config = ReuseConfig(
        "gated", max_angle=10, min_overlap=0.6, max_consecutive=cap, computed_between=between, max_surprise=255
    )
    reuse = ActionReuse(config)
    images = {"front": np.zeros((64, 64, 3), np.uint8)}
    answers: list[np.ndarray] = []
    reused: list[bool] = []
    for forget, now, kept in steps:
        if forget:
            reuse.clear()
        _, again = reuse.decide(images)
        if again is None:
            reuse.computed(ActionStep(now, kept=np.array(sorted(kept))))
        reused.append(again is not None)
        answers.append(now if again is None else again)
    assert reused == literal(steps, cap, between)
    for number, (forget, *_) in enumerate(steps):
        if reused[number]:
            assert np.array_equal(answers[number], answers[number - 1])  # so also the gripper's command
            assert not forget
            assert not steps[number - 1][0]
            assert number >= 2
    rows = "".join("r" if again else "c" for again in reused)
    assert "r" * (cap + 1) not in rows


@given(
    a=st.lists(st.floats(-1, 1, width=32), min_size=6, max_size=6),
    scale=st.floats(0.01, 100),
)
def test_an_angle_does_not_depend_on_lengths_or_order(a, scale):
    a, b = np.array(a), np.array([0.5, -0.25, 0.125, 0, 0, 1])
    assert angle_between(a, b) == angle_between(b, a)
    if np.linalg.norm(a) > 1e-3:
        assert angle_between(a * scale, b) == pytest.approx(angle_between(a, b), abs=1e-4)
        assert angle_between(a, -a) == pytest.approx(180, abs=1e-4)


def test_standing_still_twice_is_stable_and_setting_off_is_not():
    zero = np.zeros(6)
    assert angle_between(zero, zero) == 0
    assert angle_between(zero, np.ones(6)) == 90


@given(st.integers(1, 60), st.data())
def test_the_corrected_overlap_is_1_for_the_same_and_0_for_what_chance_gives(kept, data):
    tokens = 64
    before = np.sort(data.draw(st.permutations(range(tokens)))[:kept])
    assert overlap_of(before, before, tokens) == 1
    # Averaged over all that could be drawn: every token of the newer set is in the older with probability k / N.
    mean = np.mean([overlap_of(before, np.array([token]), tokens) for token in range(tokens)])
    assert mean == pytest.approx(0, abs=1e-9)


def test_the_corrected_overlap_decides_where_it_is_asked_for():
    # 8 of 10 tokens are kept, so that 0.75 in common is less than chance: stable only without the correction.
    steps = trace((0, OPEN, [0, 1, 2, 3, 4, 5, 6, 7]), *[(0, OPEN, [2, 3, 4, 5, 6, 7, 8, 9])] * 2)
    layout = TokenLayout(("front",), 2, 5)
    plain = ReuseConfig("paper", min_overlap=0.5)
    corrected = ReuseConfig("paper", min_overlap=0.5, chance_corrected=True)
    assert reasons(ActionReuse(plain, layout), steps)[-1] == "reused"
    assert reasons(ActionReuse(corrected, layout), steps)[-1] == "tokens"
    with pytest.raises(PolicyError, match="needs the number of visual tokens"):
        ActionReuse(corrected)


# ---------------------------------------------------------------- configuration


def test_a_configuration_is_a_mode_or_its_fields_also_as_json():
    assert ReuseConfig.parse("") == ReuseConfig.parse("off") == ReuseConfig()
    assert ReuseConfig.parse("paper") == ReuseConfig("paper")
    fields = ReuseConfig("gated", max_angle=7, max_consecutive=3)
    assert ReuseConfig.parse('{"mode": "gated", "max_angle": 7, "max_consecutive": 3}') == fields
    assert ReuseConfig.parse({"mode": "gated", "max_angle": 7, "max_consecutive": 3}) == fields
    assert ReuseConfig.parse(fields) is fields


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("sometimes", "choose one of off, paper, gated"),
        ("{", "must be a mode or a JSON object"),
        ({"mode": "paper", "eps1": 3}, "reuse has no setting 'eps1'; choose from mode, max_angle"),
        ({"max_angle": float("nan")}, "max_angle is nan: it must be a number from 0 to 180"),
        ({"min_overlap": "high"}, "min_overlap is 'high'"),
        ({"max_consecutive": 0}, "max_consecutive is 0: it must be a whole number from 1 to 1000"),
        ({"chance_corrected": 1}, "chance_corrected is 1"),
        ({"mode": "paper", "max_consecutive": 2}, "mode 'paper' reuses once"),
        ({"mode": "paper", "computed_between": 1}, "mode 'paper' reuses once"),
        (3, "must be a mode or a JSON object"),
    ],
)
def test_a_wrong_configuration_says_what_is_wrong(value, message):
    with pytest.raises(PolicyError, match=message):
        ReuseConfig.parse(value)
