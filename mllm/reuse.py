"""Action reuse: not running the model where it would say the same again (FlashVLA, arXiv 2505.21200, "FlashTrigger").

A *look* is an instant at which the policy would run. With A(s) the action of look s and I(s) its kept visual tokens,
the paper decides before look s, from the two looks before it, to reuse A(s) := A(s-1) iff

    alpha(s) = arccos(A(s-2).A(s-1) / (|A(s-2)| |A(s-1)|)) < eps1   and   phi(s) = |I(s-2) & I(s-1)| / |I(s-1)| > eps2

(its Eq. 6 prints alpha > eps1; its text, which makes sense, reuses where actions are stable). Our choices, where the
paper is silent: alpha is over the six numbers of the pose; the gripper's command must be the same in both, and go on
as it is; two looks that ran the model lie between two reuses; what was before a clamped command, a reset or a new
instruction is forgotten.

Our choice too is what reuse means for a policy that predicts several actions and carries out the first m of them: it
goes on with the next m of that plan. So alpha(s) is the angle between what the plan of look s-2 foresaw for the steps
of look s-1 and what look s-1 said itself, all m actions as one vector: what going on with the plan would have been
wrong by. A plan that ends is thought to hold its last action; but only a plan of a single action is held for real. With
such plans (m = 1) all of this is the paper's rule, to the letter.

The paper never looks at the current frame. Mode "gated" does: see `mllm.frame_gate`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from mllm.config import changed, check_choice, check_flags, check_numbers, check_sizes
from mllm.errors import PolicyError
from mllm.frame_gate import FrameGate
from mllm.policy import ActionStep, TokenLayout

MODES = ("off", "paper", "gated")
POSE, GRIPPER = slice(0, 6), 6


class Reason(str, Enum):
    """Why a look ran the model, or did not. The first that holds is given."""

    FIRST_STEPS = "computed-first-steps"  # fewer than two looks are remembered
    CAP = "computed-cap"  # reused `max_consecutive` times, or computed less than `computed_between` times since
    PLAN_END = "computed-plan-end"  # the plan has no action left
    GRIPPER = "computed-gripper"
    ANGLE = "computed-angle"
    TOKENS = "computed-tokens"
    FRAME_CHANGED = "computed-frame-changed"
    REUSED = "reused"


@dataclass(frozen=True)
class ReuseConfig:
    """When an action is reused. The defaults' thresholds are ours: the paper publishes none.

    mode: "off"; "paper", as published; or "gated", which also looks at the current frame.
    max_angle: degrees, the paper's eps1.  min_overlap: the paper's eps2.
    chance_corrected: take (phi - k/N) / (1 - k/N) for phi, which is 0 for k of N tokens drawn by chance.
    max_consecutive: reuses in a row.  computed_between: looks that run the model between two rows of reuses. The
        paper's are 1 and 2; more reuse than that needs the gate.
    max_surprise: grey levels of `FrameGate.surprise` above which a frame has changed. The default is what 10 % of the
        frames of LIBERO's demonstrations exceed (`flashvla calibrate`).
    """

    mode: str = "off"
    max_angle: float = 15.0
    min_overlap: float = 0.5
    chance_corrected: bool = False
    max_consecutive: int = 1
    computed_between: int = 2
    max_surprise: float = 17.0

    def __post_init__(self) -> None:
        check_choice(self, {"mode": MODES})
        check_numbers(self, {"max_angle": (0, 180), "min_overlap": (-1, 1), "max_surprise": (0, 255)})
        check_flags(self, ("chance_corrected",))
        check_sizes(self, {"max_consecutive": (1, 1000), "computed_between": (1, 1000)})
        if self.mode == "paper" and (self.max_consecutive > 1 or self.computed_between < 2):
            raise PolicyError(
                f"ReuseConfig.max_consecutive is {self.max_consecutive} and computed_between {self.computed_between}: "
                "mode 'paper' reuses once after at least 2 looks; for more, take mode 'gated', which sees what moves"
            )

    @classmethod
    def parse(cls, value: str | Mapping[str, Any] | ReuseConfig) -> ReuseConfig:
        """A mode, or fields; see `mllm.config.changed`. Raises PolicyError."""
        return changed(cls(), value, "mode", "reuse")


@dataclass(frozen=True)
class Decision:
    """What was decided at a look, and from what.

    angle: degrees, alpha.  overlap: phi, corrected or not.  None where two looks are not remembered.
    surprise: grey levels, the largest of all frames since the model ran; None where the gate is off.
    """

    reason: Reason
    angle: float | None = None
    overlap: float | None = None
    surprise: float | None = None

    @property
    def flags(self) -> dict[str, Any]:
        """As `ActionStep.flags` has them."""
        numbers = {"angle": self.angle, "overlap": self.overlap, "surprise": self.surprise}
        known = {f"reuse_{name}": number for name, number in numbers.items() if number is not None}
        return {"reuse_reason": self.reason.value, **known}


class ActionReuse:
    """The memories of one episode and the rule: call `decide` before each step, and `computed` after the policy's.

    layout: of the policy, where it has one.
    """

    def __init__(self, config: ReuseConfig, layout: TokenLayout | None = None) -> None:
        self._layout = layout
        self._gate = FrameGate(layout)
        self._left = 0  # steps for which the policy goes on with its last look
        self.configure(config)

    def configure(self, config: ReuseConfig) -> None:
        """Another rule from the next step on. Raises PolicyError: it needs the policy's layout."""
        if config.chance_corrected and self._layout is None:
            raise PolicyError("chance_corrected needs the number of visual tokens: give the policy a `layout`")
        self.config = config
        self.clear()

    def clear(self) -> None:
        """Forgets what was: the next looks run the model, even in the middle of a plan that is being reused."""
        self._kept: list[np.ndarray | None] = []
        self._plan = self._said = self._foreseen = np.empty((0, 7), np.float32)
        self._done = 0  # actions of the plan that were carried out
        self._count = 1  # actions that the policy carries out of a plan by itself
        self._again = 0  # steps for which a reuse goes on
        self._run = self._since = 0  # reuses since the model ran, looks that ran it since a reuse
        self._surprise = 0.0
        self._gate.clear()

    def decide(self, images: Mapping[str, np.ndarray]) -> tuple[Decision | None, np.ndarray | None]:
        """images: of the current frame, see `Observation`.

        Returns the decision, None where none is due, and the action (7,) to reuse, None where the policy is to act.
        """
        if self.config.mode == "off":
            return None, None
        gated = self.config.mode == "gated"
        if gated:
            self._surprise = max(self._surprise, self._gate.surprise(images))
        if self._left:
            return None, None
        decision = None
        if self._again and gated and self._surprise > self.config.max_surprise:
            self._again = 0
            decision = Decision(Reason.FRAME_CHANGED, surprise=self._surprise)
        elif not self._again:
            decision = self._decide()
            if decision.reason is Reason.REUSED:
                self._again = len(self._next())
                self._run, self._since = self._run + 1, 0
        if not self._again:
            return decision, None
        action = self._plan[min(self._done, len(self._plan) - 1)].copy()
        self._done, self._again = self._done + 1, self._again - 1
        return decision, action

    def computed(self, step: ActionStep) -> None:
        """What the policy answered."""
        looked, self._left = self._left == 0, step.left
        if not looked or self.config.mode == "off":
            return
        plan = step.action[None] if step.plan is None else step.plan
        self._count = step.left + 1
        if step.plan is not None and (plan.shape[1:] != (7,) or len(plan) < self._count):
            raise PolicyError(f"a plan of shape {plan.shape}: it must be (n, 7), n at least left + 1 = {self._count}")
        # What the plan so far would have gone on with; past its end, its last action.
        said = plan[: self._count]
        places = np.minimum(np.arange(self._done, self._done + len(said)), len(self._plan) - 1)
        self._foreseen = self._plan[places] if self._kept else self._plan[:0]
        self._plan, self._said, self._done = plan, said, self._count
        self._kept = [*self._kept[-1:], step.kept]
        self._run, self._since, self._surprise = 0, self._since + 1, 0.0
        if self.config.mode == "gated":
            self._gate.watch(step.kept)

    def _next(self) -> np.ndarray:
        """The actions that a reuse would carry out, (m, 7); none where the plan is used up."""
        if len(self._plan) == self._count == 1:
            return self._plan
        return self._plan[self._done : self._done + self._count]

    def _decide(self) -> Decision:
        config = self.config
        surprise = self._surprise if config.mode == "gated" else None
        if len(self._kept) < 2:
            return Decision(Reason.FIRST_STEPS, surprise=surprise)
        angle = angle_between(self._foreseen[:, POSE], self._said[:, POSE])
        overlap = self._overlap()
        actions = self._next()
        if self._run >= config.max_consecutive or (not self._run and self._since < config.computed_between):
            reason = Reason.CAP
        elif not len(actions):
            reason = Reason.PLAN_END
        elif not steady(self._foreseen[:, GRIPPER], self._said[:, GRIPPER], actions[:, GRIPPER]):
            reason = Reason.GRIPPER
        elif not angle < config.max_angle:
            reason = Reason.ANGLE
        elif not overlap > config.min_overlap:
            reason = Reason.TOKENS
        elif surprise is not None and surprise > config.max_surprise:
            reason = Reason.FRAME_CHANGED
        else:
            reason = Reason.REUSED
        return Decision(reason, angle, overlap, surprise)

    def _overlap(self) -> float:
        before, last = self._kept
        tokens = self._layout.tokens if self.config.chance_corrected and self._layout is not None else None
        return overlap_of(before, last, tokens)


def steady(foreseen: np.ndarray, said: np.ndarray, following: np.ndarray) -> bool:
    """Whether the gripper did what was foreseen, and goes on as it was last; commands, by their sign."""
    foreseen, said, following = (np.asarray(commands) > 0 for commands in (foreseen, said, following))
    return np.array_equal(foreseen, said) and bool((following == said[-1]).all())


def angle_between(a: np.ndarray, b: np.ndarray) -> float:
    """The angle of two arrays, each taken as one vector, in degrees; of two zeros 0, of a zero and another 90."""
    a, b = (np.asarray(array, np.float64).ravel() for array in (a, b))
    lengths = math.sqrt(a @ a), math.sqrt(b @ b)
    if not all(lengths):
        return 0.0 if lengths[0] == lengths[1] else 90.0
    return math.degrees(math.acos(min(1.0, max(-1.0, float(a @ b) / (lengths[0] * lengths[1])))))


def overlap_of(before: np.ndarray | None, last: np.ndarray | None, tokens: int | None = None) -> float:
    """phi: the share of the tokens in `last` that are in `before` too. None is all of them.

    tokens: N, to correct for chance; None does not.
    1 where both are all, or `last` is empty; 0 where only one is all: then the policy changed how it selects.
    """
    if before is None or last is None:
        return float(before is last)
    share = len(np.intersect1d(before, last)) / len(last) if len(last) else 1.0
    chance = 0.0 if tokens is None else len(before) / tokens
    return 1.0 if chance >= 1 else (share - chance) / (1 - chance)
