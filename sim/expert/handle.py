"""Move a hinge or a slide by its handle: open a drawer, turn a knob.

Nothing is remembered between steps: the pose of the grasp goes with the joint, and what to do follows from where the
hand is from it.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np

from sim.env import LiberoEnv
from sim.expert.expert import Expert
from sim.expert.geometry import COLLISION_GROUP, rotation_about
from sim.expert.hand import Hand
from sim.expert.servo import UP, funnel, grip_axes, top_down, turn_between

# All of these are our choice. Lengths in metres, angles in rad.
TURN_LEVER = 0.04  # a hand that is 1 rad off counts as this distance from the handle
STAND_OFF = 0.10  # before the handle, where the hand lines up
NEAR, ALIGNED = 0.010, 0.2  # where the fingers close
SLIPPED, TWISTED = 0.03, 0.5  # from where the hold is given up
STILL = 0.02  # m/s: fingers that move slower have a firm hold
SLIDE_LEAD, HINGE_LEAD = 0.10, 0.3  # m and rad, how far ahead of the joint the hand goes: a knob is stiff
CLOSED = 0.05  # m between fingers that are around the handle
CLEAR = 0.08  # how far the hand withdraws along the way that it came
DRAWER_TILT = 1.3  # of the hand from straight down: a drawer's handle is right above the next one's
KNOB_TILT = 0.3  # for a knob close to the robot; see `Hand.upright`
KNOB_DEPTH = 0.018  # from the top of a knob down to the grip site


def _collision_geoms(model: Any, body: int) -> np.ndarray:
    """Numbers of the body's own collision geoms."""
    return np.flatnonzero((model.geom_bodyid == body) & (model.geom_group == COLLISION_GROUP))


def bar_of(hand: Hand, joint: int, outward: np.ndarray) -> int:
    """The geom of a slide's body that stands out farthest along the (3,) direction."""
    geoms = _collision_geoms(hand.model, hand.model.jnt_bodyid[joint])
    return int(max(geoms, key=lambda geom: float(hand.data.geom_xpos[geom] @ outward)))


def _nearer_side(axes: np.ndarray) -> np.ndarray:
    """(3, 3): a gripper is the same turned half round, so of the two take the one nearer to how the hand usually is."""
    other = axes * [-1.0, -1.0, 1.0]
    return min(axes, other, key=lambda side: float(np.linalg.norm(turn_between(top_down(0.0), side))))


def drawer_handle(hand: Hand, joint: int) -> tuple[np.ndarray, np.ndarray]:
    """(3,) m and (3, 3), the grip site's pose at the handle of a slide: the bar that stands out farthest on the side to
    which it opens, held from the front and a little above.
    """
    model, data = hand.model, hand.data
    outward = data.xaxis[joint] * np.sign(model.jnt_range[joint].sum())
    bar = bar_of(hand, joint, outward)
    forward = -np.sin(DRAWER_TILT) * outward - np.cos(DRAWER_TILT) * UP
    across = np.cos(DRAWER_TILT) * outward - np.sin(DRAWER_TILT) * UP
    return data.geom_xpos[bar], _nearer_side(grip_axes(forward, across))


def knob_handle(hand: Hand, joint: int) -> tuple[np.ndarray, np.ndarray]:
    """(3,) m and (3, 3), the grip site's pose at a knob: over the hinge, across the box that rises highest, and leaning
    along it towards the robot.
    """
    model, data = hand.model, hand.data
    geoms = _collision_geoms(model, model.jnt_bodyid[joint])
    tops = {g: data.geom_xpos[g][2] + np.abs(data.geom_xmat[g][6:]) @ model.geom_size[g] for g in geoms}
    ridge = max(geoms, key=lambda geom: float(tops[geom]))
    rotation, centre = data.geom_xmat[ridge].reshape(3, 3), data.geom_xpos[ridge]
    flat = [side for side in range(3) if abs(rotation[2, side]) < 0.5]
    along = rotation[:, max(flat, key=lambda side: float(model.geom_size[ridge][side]))]
    point = centre + ((data.xanchor[joint] - centre) @ along) * along
    point[2] = tops[ridge] - KNOB_DEPTH
    near = -along * np.sign(along @ (point - hand.base))
    return point, _nearer_side(grip_axes(np.sin(KNOB_TILT) * near - np.cos(KNOB_TILT) * UP, np.cross(UP, near)))


class HandleExpert(Expert):
    """Takes a handle and moves its joint.

    joint: number of a hinge or slide.  goal: m or rad, the value to move it to.
    enough: m or rad, the value on the way there from which on a hand that does not hold it yet need not begin.
    phase: "approach", "descend", "close", "pull", "release", "retreat".
    """

    def __init__(self, env: LiberoEnv, joint: int, goal: float, enough: float, hand: Hand | None = None) -> None:
        super().__init__(env, hand)
        model = self._hand.model
        self._joint, self._goal, self._enough = joint, goal, enough
        self._address = int(model.jnt_qposadr[joint])
        self._own = model.geom_bodyid == model.jnt_bodyid[joint]
        self._hinge = model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_HINGE
        self._lead = HINGE_LEAD if self._hinge else SLIDE_LEAD
        self._find = knob_handle if self._hinge else drawer_handle

    def prepare(self) -> None:
        """There is nothing to plan."""

    def done(self) -> bool:
        off, turn = self._errors()
        beside = float(np.linalg.norm(off)) > CLEAR or float(np.linalg.norm(turn)) > TWISTED
        return beside and self._reached()

    def holding(self) -> bool:
        """Whether the hand has the handle as it should."""
        off, turn = self._errors()
        if float(np.linalg.norm(off)) > SLIPPED or float(np.linalg.norm(turn)) > TWISTED:
            return False
        # Where the handle gives way, one of the fingers may not touch it for a moment.
        return self._hand.opening < CLOSED and self._hand.touching(self._own) > 0

    @property
    def targets(self) -> np.ndarray:
        hand = self._hand.position
        return np.concatenate([self._pose(0.0)[0] - hand, self._pose(self._left())[0] - hand])

    def _reached(self) -> bool:
        """Whether the joint is where it may stay; the hand takes what it holds all the way."""
        beyond = 1.0 - self._left() / (self._goal - self._enough)
        return beyond > (0.5 if self.holding() else 0.0)

    def _left(self) -> float:
        """m or rad, how far the joint still has to go."""
        return self._goal - float(self._hand.data.qpos[self._address])

    def _pose(self, move: float) -> tuple[np.ndarray, np.ndarray]:
        """(3,) m and (3, 3): the grip site's pose at the handle, if the joint had moved on by `move`."""
        data = self._hand.data
        point, axes = self._find(self._hand, self._joint)
        axis = data.xaxis[self._joint]
        if not self._hinge:
            return point + move * axis, axes
        swing, anchor = rotation_about(axis, move), data.xanchor[self._joint]
        return anchor + swing @ (point - anchor), swing @ axes

    def _errors(self, move: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """(3,) m and (3,) rad: from the hand to that pose."""
        point, axes = self._pose(move)
        return point - self._hand.position, self._hand.turn_to(axes)

    def decide(self) -> np.ndarray:
        hand = self._hand
        off, turn = self._errors()
        backward = -hand.axes[:, 2]
        if self._reached():
            around = hand.opening < CLOSED and hand.touching(self._own) > 0
            self.phase = "release" if around else "retreat"
            return hand.action((0.0 if around else CLEAR) * backward, np.zeros(3), False)
        if self.holding():
            firm = 1.0 - min(hand.finger_speed / STILL, 1.0)
            self.phase = "pull" if firm > 0.5 else "close"
            ahead, swing = self._errors(np.clip(self._left(), -self._lead, self._lead))
            return hand.action(off + firm * (ahead - off), firm * swing, True)
        point, axes = self._pose(0.0)
        astray, away = float(np.linalg.norm(turn)), -axes[:, 2]
        steer = funnel(hand.position, point, float(point @ away) + STAND_OFF, TURN_LEVER * astray, away)
        depth = float(off @ away)
        beside = float(np.linalg.norm(off - depth * away))
        close = beside < NEAR and abs(depth) < NEAR and astray < ALIGNED
        self.phase = "close" if close else "descend" if beside < 0.03 else "approach"
        return hand.action(steer - hand.position, turn, close)
