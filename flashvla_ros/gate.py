"""The command gate: the policy proposes, the gate disposes. Pure logic without ROS; `command_gate_node` feeds it.

Two clocks. `now_ns` is ROS time, which stamps are compared with: it says how old an observation is. `mono` is the
machine's monotonic clock in seconds: it runs even when simulated time stands still, so silence is always noticed.

States: DISABLED (not enabled) and IDLE are silent; ACTIVE passes commands; STOPPING sends zero twists for
`stop_duration`, then IDLE; LATCHED sends zero twists for `stop_duration`, then is silent until `reset`.
All rules are our choice.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from flashvla_ros.fields import param, require, require_non_negative, require_positive


class State(str, Enum):
    DISABLED = "disabled"
    IDLE = "idle"
    ACTIVE = "active"
    STOPPING = "stopping"
    LATCHED = "latched"


class Verdict(str, Enum):
    PASSED = "passed"  # sent on unchanged, bit for bit
    CLAMPED = "clamped"  # scaled down to a limit, direction kept
    DROPPED = "dropped"  # not sent; the gate stays as it was
    REJECTED = "rejected"  # not sent; the robot is stopped and the gate latched


@dataclass(frozen=True)
class GateLimits:
    """Every limit of the gate; all apply to the command as it would reach the robot."""

    period: float = param(0.05, "s; control period one command is meant for (1 / control frequency)")
    max_translation: float = param(
        0.05, "m a period; longer commands are scaled down, keeping their direction", dynamic=True
    )
    max_rotation: float = param(0.25, "rad a period, by angle, not per axis; larger ones are scaled down", dynamic=True)
    max_linear_speed: float = param(
        1.0,
        "m/s, of what is commanded for a period over the time between the stamps of the two observations answered, so "
        "that commands closer together than the period cannot add up; scaled down",
        dynamic=True,
    )
    max_angular_speed: float = param(5.0, "rad/s, over the same time; scaled down", dynamic=True)
    max_opening: float = param(0.08, "m; widest gripper opening, commands are clamped to [0, max_opening]")
    gross_factor: float = param(
        1.5,
        "a twist that is itself beyond this many times a limit is rejected and latches the gate; one that is so only "
        "because it came soon after another is scaled down",
        dynamic=True,
    )
    command_timeout: float = param(0.5, "s; no accepted command for this long stops the robot", dynamic=True)
    observation_timeout: float = param(
        0.5, "s; no observation for this long stops the robot; 0 = do not watch", dynamic=True
    )
    max_observation_age: float = param(0.5, "s; a command answering an older observation is dropped", dynamic=True)
    future_tolerance: float = param(
        0.1, "s; a command stamped further in the future is dropped; the clock going back by more stops the robot"
    )
    stop_duration: float = param(0.5, "s; how long zero twists are repeated when stopping, before silence")
    cooldown: float = param(2.0, "s after a latch before it can be reset", dynamic=True)

    def __post_init__(self) -> None:
        require_positive(
            self,
            "period",
            "max_translation",
            "max_rotation",
            "max_linear_speed",
            "max_angular_speed",
            "max_opening",
            "command_timeout",
            "max_observation_age",
            "future_tolerance",
        )
        require_non_negative(self, "observation_timeout", "stop_duration", "cooldown")
        require(
            math.isfinite(self.gross_factor) and self.gross_factor >= 1,
            "gross_factor",
            self.gross_factor,
            "a finite number of 1 or more",
        )


@dataclass(frozen=True)
class Command:
    """linear: (3,) m/s; angular: (3,) rad/s; opening: gripper opening in m, None = leave it;
    stamp_ns: ROS time of the observation that the command answers."""

    linear: np.ndarray
    angular: np.ndarray
    opening: float | None
    stamp_ns: int


@dataclass(frozen=True)
class Decision:
    """What became of a command. command: what to send to the robot, None = nothing."""

    verdict: Verdict
    reason: str
    command: Command | None = None


@dataclass(frozen=True)
class Stop:
    """Send a zero twist now. first: the robot was not yet being stopped before this."""

    reason: str
    first: bool


class CommandGate:
    """Checks every command and watches for silence. Call `submit` for a command, `observed` for an observation,
    `tick` often (at least five times within the shortest time-out)."""

    def __init__(self, limits: GateLimits, *, enabled: bool = True) -> None:
        self.limits = limits
        self.enabled = enabled
        self.state, self.reason = self._rest()
        self.counts: Counter[str] = Counter({v.value: 0 for v in Verdict})
        self.reasons: Counter[str] = Counter()
        self.last_refusal = ""  # since commands last passed
        self.estop_pressed = False
        self._last_stamp_ns: int | None = None
        self._last_now_ns: int | None = None
        self._last_command = -math.inf
        self._last_observation = -math.inf
        self._stop_since = -math.inf
        self._stop_announced = True

    # ------------------------------------------------------------------ inputs

    def observed(self, mono: float) -> None:
        """An observation arrived at the machine time `mono`."""
        self._last_observation = mono

    def submit(self, command: Command, now_ns: int, mono: float) -> Decision:
        """Judges one command."""
        self._watch_clock(now_ns, mono)
        decision = self._counted(self._judge(command, now_ns, mono))
        if decision.command is not None:
            self._last_stamp_ns, self._last_command = command.stamp_ns, mono
            self.state, self.reason = State.ACTIVE, "passing commands"
        elif decision.verdict is Verdict.REJECTED:
            self.latch(decision.reason, mono)
        return decision

    def refuse(self, reason: str) -> Decision:
        """Counts a command that could not even be read."""
        return self._counted(Decision(Verdict.DROPPED, reason))

    def enable(self, on: bool, mono: float) -> None:
        """Enables or disables; disabling stops the robot first. A latched gate stays latched."""
        changed, self.enabled = on is not self.enabled, on
        if changed and self.state is not State.LATCHED:
            if on:
                self.state, self.reason = self._rest()
            else:
                self._begin_stop("not enabled", mono, State.DISABLED)

    def latch(self, reason: str, mono: float) -> None:
        """Emergency stop: nothing passes until `reset`."""
        self._begin_stop(reason, mono, State.LATCHED)

    def press_estop(self, pressed: bool, mono: float) -> None:
        """The state of an emergency-stop button: pressing latches, releasing only makes `reset` possible."""
        if pressed and not self.estop_pressed:
            self.latch("emergency stop pressed", mono)
        self.estop_pressed = pressed

    def reset(self, mono: float) -> tuple[bool, str]:
        """Takes a latch back. Returns (done, why or why not)."""
        if self.state is not State.LATCHED:
            return True, f"nothing to reset: the gate is {self.state.value}"
        if self.estop_pressed:
            return False, "the emergency stop is still pressed: release it first"
        left = self._stop_since + self.limits.cooldown - mono
        if left > 0:
            return False, f"cooling down: try again in {left:.1f} s (latched: {self.reason})"
        self.state, self.reason = self._rest()
        self._last_stamp_ns = None
        return True, f"reset; {self.reason}"

    # ------------------------------------------------------------------ time

    def tick(self, now_ns: int, mono: float) -> Stop | None:
        """Looks at the clocks. Returns a Stop when a zero twist must be sent now."""
        self._watch_clock(now_ns, mono)
        if self.state is State.ACTIVE:
            if mono - self._last_command > self.limits.command_timeout:
                self._begin_stop(f"no command: none accepted for {self.limits.command_timeout} s", mono, State.STOPPING)
            elif self._observation_is_late(mono):
                self._begin_stop(f"no observation: none for {self.limits.observation_timeout} s", mono, State.STOPPING)
        if self._stop_announced and mono - self._stop_since > self.limits.stop_duration:
            if self.state is State.STOPPING:
                self.state = State.IDLE  # the reason stays: it says why the robot stands still
            return None
        first, self._stop_announced = not self._stop_announced, True
        return Stop(self.reason, first) if self.state is not State.ACTIVE else None

    # ------------------------------------------------------------------ rules

    def _judge(self, command: Command, now_ns: int, mono: float) -> Decision:
        def dropped(reason: str) -> Decision:
            return Decision(Verdict.DROPPED, reason)

        linear, angular = np.asarray(command.linear, float), np.asarray(command.angular, float)
        if linear.shape != (3,) or angular.shape != (3,):
            return dropped(f"wrong shape: linear {linear.shape} and angular {angular.shape}, both must be (3,)")
        if not (np.isfinite(linear).all() and np.isfinite(angular).all()):
            return dropped("not finite: the twist has NaN or infinity")
        if command.opening is not None and not math.isfinite(command.opening):
            return dropped("not finite: the gripper opening is NaN or infinity")
        if self.state in (State.LATCHED, State.DISABLED):
            return dropped(f"{self.state.value}: {self.reason}")
        limits = self.limits
        age = (now_ns - command.stamp_ns) * 1e-9
        if age > limits.max_observation_age:
            return dropped(f"stale: answers an observation {age:.3f} s old, limit {limits.max_observation_age} s")
        if age < -limits.future_tolerance:
            return dropped(f"future: stamped {-age:.3f} s ahead of the clock, limit {limits.future_tolerance} s")
        if self._observation_is_late(mono):
            return dropped(f"no observation: none for {limits.observation_timeout} s")
        speed, turn = math.hypot(*linear), math.hypot(*angular)
        if self._last_stamp_ns is not None and command.stamp_ns <= self._last_stamp_ns:
            if speed == turn == 0:  # a stop is always welcome, but it must not move the gripper
                stop = replace(command, opening=None, stamp_ns=self._last_stamp_ns)
                return Decision(Verdict.PASSED, "stop", stop)
            return dropped("out of order: not newer than the last accepted command")
        return self._limit(replace(command, linear=linear, angular=angular), speed, turn)

    def _counted(self, decision: Decision) -> Decision:
        self.counts[decision.verdict.value] += 1
        if decision.verdict is not Verdict.PASSED:
            self.reasons[decision.reason.split(":")[0]] += 1
        self.last_refusal = decision.reason if decision.command is None else ""
        return decision

    def _limit(self, command: Command, speed: float, turn: float) -> Decision:
        limits = self.limits
        ratios, detail = self._ratios(speed, turn, limits.period)
        if max(ratios.values()) > limits.gross_factor:  # of the twist itself: when frames come is not its fault
            return Decision(Verdict.REJECTED, f"gross {detail}")
        if self._last_stamp_ns is not None:
            interval = min(limits.period, (command.stamp_ns - self._last_stamp_ns) * 1e-9)
            ratios, detail = self._ratios(speed, turn, interval)
        opening = command.opening
        if opening is not None:
            opening = min(max(opening, 0.0), limits.max_opening)
        linear_scale = max(1.0, ratios["translation"], ratios["linear speed"])
        angular_scale = max(1.0, ratios["rotation"], ratios["angular speed"])
        if linear_scale == angular_scale == 1.0:
            if opening == command.opening:
                return Decision(Verdict.PASSED, "within limits", command)
            detail = f"gripper: {command.opening:.4g} m, limits 0 to {limits.max_opening:.4g} m"
        limited = replace(
            command, linear=command.linear / linear_scale, angular=command.angular / angular_scale, opening=opening
        )
        return Decision(Verdict.CLAMPED, detail, limited)

    def _ratios(self, speed: float, turn: float, interval: float) -> tuple[dict[str, float], str]:
        """How many times over its limit each quantity is, and the worst in words, where what is commanded for a period
        (m/s, rad/s) is over after `interval` s.
        """
        limits, hurry = self.limits, self.limits.period / interval
        quantities = {
            "translation": (speed * limits.period, limits.max_translation, "m"),
            "rotation": (turn * limits.period, limits.max_rotation, "rad"),
            "linear speed": (speed * hurry, limits.max_linear_speed, "m/s"),
            "angular speed": (turn * hurry, limits.max_angular_speed, "rad/s"),
        }
        ratios = {name: value / limit for name, (value, limit, _) in quantities.items()}
        worst = max(ratios, key=lambda name: ratios[name])
        value, limit, unit = quantities[worst]
        return ratios, f"{worst}: {value:.4g} {unit}, limit {limit:.4g} {unit}"

    def _observation_is_late(self, mono: float) -> bool:
        limit = self.limits.observation_timeout
        return limit > 0 and mono - self._last_observation > limit

    def _watch_clock(self, now_ns: int, mono: float) -> None:
        last, self._last_now_ns = self._last_now_ns, now_ns
        if last is not None and now_ns < last - int(self.limits.future_tolerance * 1e9):
            self._last_stamp_ns = None  # stamps of the new time base are compared with each other only
            if self.state is State.ACTIVE:
                self._begin_stop("clock jumped back", mono, State.STOPPING)

    def _rest(self) -> tuple[State, str]:
        return (State.IDLE, "waiting for commands") if self.enabled else (State.DISABLED, "not enabled")

    def _begin_stop(self, reason: str, mono: float, state: State) -> None:
        self.state, self.reason = state, reason
        self._stop_since, self._stop_announced = mono, False
