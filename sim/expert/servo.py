"""From where the gripper should be to the action that takes it there."""

from __future__ import annotations

import numpy as np

from mllm.policy import ActionSpec
from sim.expert.geometry import rotation_about_z, rotation_vector

# The grip site's axes when the gripper points straight down at yaw 0: its fingers then close along the world's y.
TOP_DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
# Our choice: the controller covers about half of a commanded offset in one step, and less than one of a turn.
POSITION_GAIN = 2.0
ROTATION_GAIN = 1.5


def clip_length(vector: np.ndarray, largest: float = 1.0) -> np.ndarray:
    """`vector`, made shorter where a component exceeds `largest` in magnitude; its direction stays."""
    longest = float(np.abs(vector).max())
    return vector * (largest / longest) if longest > largest else vector


def turn_to(rotation: np.ndarray, yaw: float) -> np.ndarray:
    """(3,) rad, world frame: the rotation vector from a grip site's (3, 3) axes to top-down at `yaw`."""
    return rotation_vector(rotation_about_z(yaw) @ TOP_DOWN @ rotation.T)


def servo(offset: np.ndarray, turn: np.ndarray, close: bool, spec: ActionSpec) -> np.ndarray:
    """(7,) float32 action in [-1, 1], as `spec` scales it.

    offset: (3,) m from the grip site to where it should be.  turn: (3,) rad, see `turn_to`; both in the world frame.
    close: whether the gripper closes; else it opens.
    Proportional, and where clipped, clipped as a vector: a straight way stays straight.
    """
    move = clip_length(POSITION_GAIN * offset / spec.translation_scale)
    rotate = clip_length(ROTATION_GAIN * turn / spec.rotation_scale)
    action = np.concatenate([move, rotate, [1.0 if close else -1.0]])
    return np.clip(action, -1.0, 1.0).astype(np.float32)
