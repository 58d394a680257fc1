"""The command gate: every rule, driven by explicit clocks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashvla_ros.errors import ConfigurationError
from flashvla_ros.gate import Command, CommandGate, GateLimits, State, Verdict

LIMITS = GateLimits(
    period=0.05,
    max_translation=0.02,
    max_rotation=0.1,
    max_linear_speed=0.4,
    max_angular_speed=2.0,
    command_timeout=0.25,
    observation_timeout=0.25,
    max_observation_age=0.5,
    stop_duration=0.1,
    cooldown=2.0,
)
SECOND = 1_000_000_000
START = 100 * SECOND
PERIOD_NS = 50_000_000


def command(linear=(0.1, 0, 0), angular=(0, 0, 0), opening=0.04, stamp=START) -> Command:
    return Command(np.array(linear, float), np.array(angular, float), opening, stamp)


def running(limits: GateLimits = LIMITS) -> CommandGate:
    gate = CommandGate(limits)
    gate.observed(0.0)
    return gate


def send(gate: CommandGate, cmd: Command, now_ns: int | None = None, mono: float = 0.0):
    gate.observed(mono)
    return gate.submit(cmd, cmd.stamp_ns if now_ns is None else now_ns, mono)


def test_command_within_limits_passes_unchanged_bit_for_bit():
    cmd = command(linear=(0.1, -0.2, 0.05), angular=(0.3, 0.1, -0.2))
    decision = send(running(), cmd)
    assert decision.verdict is Verdict.PASSED
    assert decision.command is not None
    assert decision.command.linear.tobytes() == cmd.linear.tobytes()
    assert decision.command.angular.tobytes() == cmd.angular.tobytes()
    assert decision.command.opening == cmd.opening
    assert decision.command.stamp_ns == cmd.stamp_ns


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["linear", "angular", "opening"])
def test_not_finite_is_dropped_and_the_robot_goes_on(field, value):
    gate = running()
    send(gate, command())
    bad = command(stamp=START + PERIOD_NS)
    bad = dataclasses.replace(bad, **{field: value if field == "opening" else np.array([0, value, 0.0])})
    decision = send(gate, bad)
    assert decision.verdict is Verdict.DROPPED
    assert decision.command is None
    assert "not finite" in decision.reason
    assert gate.state is State.ACTIVE


@pytest.mark.parametrize("shape", [(2,), (6,), (1, 3), ()])
def test_wrong_shape_is_dropped_with_the_shape_in_the_reason(shape):
    decision = send(running(), Command(np.zeros(shape), np.zeros(3), None, START))
    assert decision.verdict is Verdict.DROPPED
    assert str(shape) in decision.reason


def test_small_excess_of_translation_is_scaled_keeping_direction():
    decision = send(running(), command(linear=(0.3, 0.4, 0)))  # 0.5 m/s x 0.05 s = 0.025 m, limit 0.02 m
    assert decision.verdict is Verdict.CLAMPED
    assert decision.command is not None
    np.testing.assert_allclose(decision.command.linear, [0.24, 0.32, 0])


def test_rotation_is_limited_by_angle_not_per_component():
    one_axis = send(running(), command(angular=(2.0, 0, 0)))  # 0.1 rad a period: at the limit
    assert one_axis.verdict is Verdict.PASSED
    three_axes = send(running(), command(angular=(1.5, 1.5, 1.5)))  # each below it, 0.13 rad together
    assert three_axes.verdict is Verdict.CLAMPED
    assert three_axes.command is not None
    assert np.linalg.norm(three_axes.command.angular) * LIMITS.period == pytest.approx(0.1)


def test_commands_faster_than_the_period_are_limited_by_speed():
    gate = running()
    send(gate, command(linear=(0.36, 0, 0)))
    faster = command(linear=(0.36, 0, 0), stamp=START + int(PERIOD_NS * 0.8))  # 0.018 m in 0.04 s: 0.45 m/s
    decision = send(gate, faster)
    assert decision.verdict is Verdict.CLAMPED
    assert "linear speed" in decision.reason
    assert decision.command is not None
    assert decision.command.linear[0] == pytest.approx(0.36 * 0.4 / 0.45)


@pytest.mark.parametrize("gap_ms", [1, 5, 20, 33])
def test_observations_close_together_scale_a_command_within_limits_down_and_never_latch(gap_ms):
    gate = running()
    send(gate, command(linear=(0.39, 0, 0), angular=(0, 1.9, 0)))
    decision = send(gate, command(linear=(0.39, 0, 0), angular=(0, 1.9, 0), stamp=START + gap_ms * 1_000_000))
    assert decision.verdict is Verdict.CLAMPED
    assert gate.state is State.ACTIVE
    assert decision.command is not None
    assert decision.command.linear[0] == pytest.approx(0.4 * gap_ms / 50)
    assert decision.command.angular[1] == pytest.approx(2.0 * gap_ms / 50)


def test_a_speed_that_is_gross_by_itself_is_rejected_however_far_apart_observations_are():
    limits = dataclasses.replace(LIMITS, max_translation=1.0)  # so that only the speed counts
    gate = running(limits)
    send(gate, command())
    assert send(gate, command(linear=(0.59, 0, 0), stamp=START + SECOND)).verdict is Verdict.CLAMPED
    rejected = send(gate, command(linear=(0.61, 0, 0), stamp=START + 2 * SECOND))
    assert rejected.verdict is Verdict.REJECTED
    assert rejected.reason == "gross linear speed: 0.61 m/s, limit 0.4 m/s"


def test_gross_excess_is_rejected_and_latches():
    gate = running()
    send(gate, command())
    decision = send(gate, command(linear=(5, 0, 0), stamp=START + PERIOD_NS))
    assert decision.verdict is Verdict.REJECTED
    assert decision.command is None
    assert "5 m/s" in decision.reason or "0.25 m" in decision.reason
    assert gate.state is State.LATCHED
    stop = gate.tick(START + PERIOD_NS, 0.0)
    assert stop is not None
    assert stop.first
    after = send(gate, command(stamp=START + 2 * PERIOD_NS))
    assert after.verdict is Verdict.DROPPED
    assert after.reason.startswith("latched")


def test_gripper_is_clamped_to_the_opening_range():
    decision = send(running(), command(opening=0.2))
    assert decision.verdict is Verdict.CLAMPED
    assert decision.command is not None
    assert decision.command.opening == LIMITS.max_opening


def test_stale_command_is_dropped():
    decision = send(running(), command(), now_ns=START + int(0.6 * SECOND))
    assert decision.verdict is Verdict.DROPPED
    assert decision.reason.startswith("stale")


def test_future_command_is_dropped():
    decision = send(running(), command(), now_ns=START - int(0.2 * SECOND))
    assert decision.verdict is Verdict.DROPPED
    assert decision.reason.startswith("future")


def test_out_of_order_command_is_dropped():
    gate = running()
    send(gate, command(stamp=START + PERIOD_NS))
    decision = send(gate, command(stamp=START), now_ns=START + PERIOD_NS)
    assert decision.verdict is Verdict.DROPPED
    assert decision.reason.startswith("out of order")


def test_repeated_stamp_with_zero_twist_stops_without_moving_the_gripper():
    gate = running()
    send(gate, command(opening=0.0))
    decision = send(gate, command(linear=(0, 0, 0), opening=0.08))
    assert decision.verdict is Verdict.PASSED
    assert decision.command is not None
    assert decision.command.opening is None


def test_clock_jumping_back_stops_and_then_accepts_the_new_time():
    gate = running()
    send(gate, command())
    earlier = START - 50 * SECOND
    gate.observed(0.01)
    stop = gate.tick(earlier, 0.01)
    assert stop is not None
    assert "clock jumped back" in stop.reason
    assert send(gate, command(stamp=earlier + PERIOD_NS), mono=0.02).verdict is Verdict.PASSED


def test_command_timeout_stops_with_zero_twists_and_then_is_silent():
    gate = running()
    send(gate, command(), mono=0.0)
    gate.observed(0.24)
    assert gate.tick(START, 0.24) is None
    gate.observed(0.26)
    first = gate.tick(START, 0.26)
    assert first is not None
    assert first.first
    assert "no command" in first.reason
    again = gate.tick(START, 0.30)
    assert again is not None
    assert not again.first
    assert gate.tick(START, 0.40) is None
    assert gate.state is State.IDLE
    assert gate.tick(START, 10.0) is None


def test_commands_resume_after_a_timeout_without_a_reset():
    gate = running()
    send(gate, command())
    assert gate.tick(START, 1.0) is not None
    assert send(gate, command(stamp=START + SECOND), mono=1.05).verdict is Verdict.PASSED
    assert gate.state is State.ACTIVE


def test_observation_timeout_stops_although_commands_come():
    gate = running()
    gate.observed(0.0)
    for step in range(6):
        mono = step * 0.05
        gate.submit(command(stamp=START + step * PERIOD_NS), START + step * PERIOD_NS, mono)
    late = gate.submit(command(stamp=START + SECOND), START + SECOND, 0.3)
    assert late.verdict is Verdict.DROPPED
    stop = gate.tick(START + SECOND, 0.3)
    assert stop is not None
    assert "no observation" in stop.reason


def test_no_observation_ever_means_no_command_passes():
    decision = CommandGate(LIMITS).submit(command(), START, 0.0)
    assert decision.verdict is Verdict.DROPPED
    assert "no observation" in decision.reason


def test_disabled_gate_passes_nothing_until_enabled():
    gate = CommandGate(LIMITS, enabled=False)
    assert send(gate, command()).verdict is Verdict.DROPPED
    gate.enable(True, 0.0)
    assert send(gate, command()).verdict is Verdict.PASSED


def test_disabling_stops_the_robot_first():
    gate = running()
    send(gate, command())
    gate.enable(False, 0.0)
    stop = gate.tick(START, 0.0)
    assert stop is not None
    assert stop.first
    assert gate.state is State.DISABLED


def test_reset_is_refused_while_cooling_down_and_while_the_button_is_pressed():
    gate = running()
    gate.press_estop(True, 10.0)
    done, why = gate.reset(11.0)
    assert not done
    assert "pressed" in why
    gate.press_estop(False, 11.0)
    done, why = gate.reset(11.5)
    assert not done
    assert "0.5 s" in why
    done, _ = gate.reset(12.0)
    assert done
    assert gate.state is State.IDLE


def test_reset_of_a_gate_disabled_before_the_latch_stays_disabled():
    gate = CommandGate(LIMITS, enabled=False)
    gate.latch("test", 0.0)
    gate.reset(5.0)
    assert gate.state is State.DISABLED


def test_holding_the_button_does_not_extend_the_cooldown():
    gate = running()
    gate.press_estop(True, 0.0)
    gate.press_estop(True, 1.9)
    gate.press_estop(False, 1.9)
    assert gate.reset(2.0)[0]


def test_counts_tell_every_verdict_and_reason():
    gate = running()
    send(gate, command())
    send(gate, command(linear=(0.5, 0, 0), stamp=START + PERIOD_NS))
    send(gate, command(linear=(np.nan, 0, 0), stamp=START + 2 * PERIOD_NS))
    send(gate, command(linear=(9, 0, 0), stamp=START + 3 * PERIOD_NS))
    assert dict(gate.counts) == {"passed": 1, "clamped": 1, "dropped": 1, "rejected": 1}
    assert gate.reasons["not finite"] == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("period", 0.0),
        ("max_translation", -1.0),
        ("gross_factor", 0.5),
        ("command_timeout", float("nan")),
        ("observation_timeout", -0.1),
        ("cooldown", float("inf")),
    ],
)
def test_wrong_limit_is_refused_by_name(name, value):
    with pytest.raises(ConfigurationError, match=name):
        GateLimits(**{name: value})


number = st.floats(allow_nan=True, allow_infinity=True, width=64)
vector = st.tuples(number, number, number)
interval = st.integers(-2 * PERIOD_NS, 4 * PERIOD_NS)


@given(st.lists(st.tuples(vector, vector, st.none() | number, interval, st.floats(0, 0.3)), max_size=30))
def test_whatever_comes_nothing_beyond_a_limit_goes_out(stream):
    gate = running()
    now, mono, last = START, 0.0, None
    for linear, angular, opening, step_ns, pause in stream:
        now, mono = now + step_ns, mono + pause
        gate.observed(mono)
        stop = gate.tick(now, mono)
        assert stop is None or gate.state is not State.ACTIVE
        was_latched = gate.state is State.LATCHED
        decision = gate.submit(command(linear, angular, opening, now), now, mono)
        out = decision.command
        assert (out is not None) == (decision.verdict in (Verdict.PASSED, Verdict.CLAMPED))
        assert not (was_latched and out is not None)
        if out is None:
            continue
        speed, turn = np.linalg.norm(out.linear), np.linalg.norm(out.angular)
        assert speed * LIMITS.period <= LIMITS.max_translation * (1 + 1e-9)
        assert turn * LIMITS.period <= LIMITS.max_rotation * (1 + 1e-9)
        assert out.opening is None or 0 <= out.opening <= LIMITS.max_opening
        if last is not None and out.stamp_ns > last:
            gap = min(LIMITS.period, (out.stamp_ns - last) * 1e-9)
            assert speed * LIMITS.period / gap <= LIMITS.max_linear_speed * (1 + 1e-9)
        last = out.stamp_ns
