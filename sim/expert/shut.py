"""Push a drawer shut with closed fingers."""

from __future__ import annotations

import numpy as np

from sim.env import LiberoEnv
from sim.expert.expert import Expert
from sim.expert.geometry import body_points
from sim.expert.hand import Hand
from sim.expert.handle import bar_of
from sim.expert.servo import UP, funnel, grip_axes

# All of these are our choice. Lengths in metres, angles in rad.
TILT = 0.6  # of the hand from straight down, so that it stays clear of the handles above
SHUT, SHUT_ENOUGH = 0.006, 0.001  # beyond 0, where LIBERO calls a drawer closed from: where to push it, and when it is
STAND_OFF, SIDEWAYS, BEHIND = 0.06, 0.03, 0.10  # before the handle; and how far off the hand still pushes
ASKEW = 0.35
LEAD = 0.10  # how far ahead of the handle the hand goes: a drawer is stiff
OVER = 0.08  # above whatever the drawer belongs to
TURN_LEVER = 0.04  # a hand that is 1 rad off counts as this distance from the handle


class ShutExpert(Expert):
    """joint: number of a slide.  phase: "approach", "push", "retreat"."""

    def __init__(self, env: LiberoEnv, joint: int, hand: Hand | None = None) -> None:
        super().__init__(env, hand)
        model = self._hand.model
        self._joint, self._address = joint, int(model.jnt_qposadr[joint])
        self._inward = -float(np.sign(model.jnt_range[joint].sum()))
        self._root = int(model.body_parentid[model.jnt_bodyid[joint]])

    def prepare(self) -> None:
        """There is nothing to plan."""

    def done(self) -> bool:
        return self._left() < SHUT - SHUT_ENOUGH

    def holding(self) -> bool:
        return False

    @property
    def targets(self) -> np.ndarray:
        point, inward = self._front()
        off = point - self._hand.position
        return np.concatenate([off, off + max(self._left(), 0.0) * inward])

    def _left(self) -> float:
        """m, how far the drawer still has to go."""
        return SHUT - self._inward * float(self._hand.data.qpos[self._address])

    def _front(self) -> tuple[np.ndarray, np.ndarray]:
        """(3,) m, the middle of the drawer's handle, and (3,) the direction in which the drawer closes."""
        inward = self._inward * self._hand.data.xaxis[self._joint]
        return self._hand.data.geom_xpos[bar_of(self._hand, self._joint, -inward)], inward

    def decide(self) -> np.ndarray:
        hand = self._hand
        point, inward = self._front()
        turn = hand.turn_to(grip_axes(np.sin(TILT) * inward - np.cos(TILT) * UP, np.cross(UP, inward)))
        if self.done():
            self.phase = "retreat"
            return hand.action(STAND_OFF * (UP - inward), turn, True)
        off = point - hand.position
        before = float(off @ inward)
        astray = float(np.linalg.norm(turn))
        if -0.02 < before < BEHIND and np.linalg.norm(off - before * inward) < SIDEWAYS and astray < ASKEW:
            self.phase = "push"
            return hand.action(off + min(self._left(), LEAD) * inward, turn, True)
        self.phase = "approach"
        top = float(body_points(hand.model, hand.data, self._root)[:, 2].max()) + OVER
        steer = funnel(hand.position, point - STAND_OFF * inward, top, TURN_LEVER * astray)
        return hand.action(steer - hand.position, turn, True)
