"""From where the gripper should be to the action that takes it there."""

from __future__ import annotations

import numpy as np

from mllm.policy import ActionSpec
from sim.expert.geometry import rotation_about_z, rotation_vector

# All of these are our choice. The controller covers about half of a commanded offset in one step, and less of a turn.
POSITION_GAIN = 2.0
ROTATION_GAIN = 1.5
FUNNEL_SLOPE, STEEP_SLOPE = 3.0, 12.0  # rise over run of the way down to a goal, and of one between tall things
FUNNEL_MOUTH = 0.008  # m across from which on it rises
UP = np.array([0.0, 0.0, 1.0])


def grip_axes(forward: np.ndarray, closing: np.ndarray) -> np.ndarray:
    """(3, 3) axes, in columns, of a grip site whose fingers point along one unit vector and close along another."""
    return np.column_stack([closing, np.cross(forward, closing), forward])


def top_down(yaw: float) -> np.ndarray:
    """(3, 3) axes of a grip site that points straight down; at yaw 0 its fingers close along the world's y."""
    return rotation_about_z(yaw) @ grip_axes(-UP, np.array([0.0, 1.0, 0.0]))


def turn_between(axes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(3,) rad, world frame: the rotation vector from one (3, 3) rotation to another."""
    return rotation_vector(wanted @ axes.T)


def clip_length(vector: np.ndarray, largest: float = 1.0) -> np.ndarray:
    """`vector`, made shorter where a component exceeds `largest` in magnitude; its direction stays."""
    longest = float(np.abs(vector).max())
    return vector * (largest / longest) if longest > largest else vector


def servo(offset: np.ndarray, turn: np.ndarray, close: bool, spec: ActionSpec) -> np.ndarray:
    """(7,) float32 action in [-1, 1], as `spec` scales it.

    offset: (3,) m from the grip site to where it should be.  turn: (3,) rad, see `turn_between`; in the world frame.
    close: whether the gripper closes; else it opens.
    Proportional, and where clipped, clipped as a vector: a straight way stays straight.
    """
    move = clip_length(POSITION_GAIN * offset / spec.translation_scale)
    rotate = clip_length(ROTATION_GAIN * turn / spec.rotation_scale)
    action = np.concatenate([move, rotate, [1.0 if close else -1.0]])
    return np.clip(action, -1.0, 1.0).astype(np.float32)


def funnel(
    position: np.ndarray,
    goal: np.ndarray,
    ceiling: float,
    astray: float = 0.0,
    axis: np.ndarray = UP,
    slope: float = FUNNEL_SLOPE,
) -> np.ndarray:
    """(3,) m: where to steer `position` next, so that it comes down `axis` on `goal` and hits nothing beside it.

    Far away that is over the goal at height `ceiling`; within the funnel it sinks with the distance; and from below
    the funnel's wall it rises first, and moves across in proportion as it gets there.
    ceiling: m along the unit vector `axis` from the world's origin.
    astray: m, added to the distance while something else than the position is not right yet.
    slope: rise over run of the funnel's wall.
    """
    height, floor = float(position @ axis), float(goal @ axis)
    across = goal - position - (floor - height) * axis
    away = float(np.hypot(np.linalg.norm(across), astray))
    wall = floor + min(slope * max(away - FUNNEL_MOUTH, 0.0), max(ceiling - floor, 0.0))
    freedom = np.clip((height - wall) / 0.04 + 1.5, 0.0, 1.0)  # 1 from 2 cm below the wall on, 0 from 6 cm
    return position + freedom * across + (wall - height) * axis
