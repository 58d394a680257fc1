"""What a pick-and-place episode settles before it starts: where to hold the object, and how high to travel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sim.expert.geometry import body_points, corridor
from sim.expert.grasp import FINGERS_HALF_LENGTH, FINGERTIP, PALM, PALM_HALF_LENGTH, Scene, find_grasp
from sim.expert.servo import FUNNEL_SLOPE, STEEP_SLOPE

CLEARANCE = 0.03  # m over everything on the way; this and the next are our choice
LEAST_RISE = 0.05  # m to come from above, and to lift
BESIDE = 0.07  # m from the grip site: what stands nearer, and higher than the palm, is come down beside steeply


@dataclass(frozen=True)
class Plan:
    """What one episode keeps. Positions are in the world frame.

    origin, rotation: (3,) m and (3, 3), the object's pose for which it was made.
    target: (3,) m, where the target was.
    offset: (3,) m from the object's origin to the grip site.
    yaw: rad, the gripper's turn about z with it.
    points: (n, 3) m, the object's hull in its own frame.
    hover, carry: m, heights of the grip site on the way to the object, and of the object's origin on the way back.
    slope: of the way down to the object, see `sim.expert.servo.funnel`; steep where the palm comes down beside things.
    rest: m, height of the object's lowest point at the target, from the target's origin.
    """

    origin: np.ndarray
    rotation: np.ndarray
    target: np.ndarray
    offset: np.ndarray
    yaw: float
    points: np.ndarray
    hover: float
    slope: float
    carry: float
    rest: float


def make_plan(scene: Scene, hand: np.ndarray, base: np.ndarray, target: np.ndarray, container: bool) -> Plan | None:
    """The plan for carrying the scene's object from where it is to `target`, (3,) m; None where nothing can hold it.

    hand, base, container: see `sim.expert.grasp.find_grasp`.
    """
    origin = scene.data.xpos[scene.body].copy()
    rotation = scene.data.xmat[scene.body].reshape(3, 3).copy()
    points = body_points(scene.model, scene.data, scene.body)
    low, top = float(points[:, 2].min()), float(points[:, 2].max())
    rest = resting_height(scene, points - [*origin[:2], low], target[:2])
    move = np.array([*(target[:2] - origin[:2]), rest - low])
    grasp = find_grasp(scene, hand, base, move, container)
    if grasp is None:
        return None

    def highest(start: np.ndarray, end: np.ndarray, radius: float) -> float:
        return float(scene.heights(corridor(start, end, radius), own=False).max())

    # What travels clears what it passes over, and so does the palm, which is wider but higher up.
    hold = grasp.position
    fingers = highest(hand, hold[:2], FINGERS_HALF_LENGTH) + FINGERTIP
    palm = highest(hand, hold[:2], PALM_HALF_LENGTH) - PALM
    hover = max(max(fingers, palm) + CLEARANCE, top + LEAST_RISE)

    steep = highest(hold[:2], hold[:2], BESIDE) > float(hold[2]) + PALM

    radius = float(np.linalg.norm(points[:, :2] - origin[:2], axis=1).max()) + 0.01
    item_rise = highest(origin[:2], target[:2], radius) - low
    palm_rise = highest(hold[:2], hold[:2] + move[:2], PALM_HALF_LENGTH) - (float(hold[2]) + PALM)
    carry = float(origin[2]) + max(max(item_rise, palm_rise) + CLEARANCE, LEAST_RISE)
    return Plan(
        origin=origin,
        rotation=rotation,
        target=target.copy(),
        offset=hold - origin,
        yaw=grasp.yaw,
        points=(points - origin) @ rotation,
        hover=hover,
        slope=STEEP_SLOPE if steep else FUNNEL_SLOPE,
        carry=carry,
        rest=rest - float(target[2]),
    )


def resting_height(scene: Scene, points: np.ndarray, place: np.ndarray) -> float:
    """The height, m, at which the object's lowest point comes to rest when it is let down over `place`, (2,) m.

    points: (n, 3) m, the object's, from the point at its lowest height that is right below its origin.
    """
    bottom = points[points[:, 2] < 0.02]
    supports = scene.heights(place + bottom[:, :2], own=False)
    return float((supports - bottom[:, 2]).max())
