"""Where to take hold of an object with a parallel gripper from above.

The object's height profile is cast along the axis on which the fingers close. Every stretch of it that rises above the
fingertips and fits between the open fingers is a candidate: one wall of a bowl is a stretch, and so is a whole box
across its narrow side. The rest is a score. Numbers are our choice, from the Panda gripper's measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sim.expert.geometry import body_points, corridor, heights, rotation_about_z

MAX_OPENING = 0.078  # m between the open pads
FINGERTIP = 0.011  # m from the grip site down to the fingertips
FINGER_THICKNESS = 0.016  # m along the closing axis
FINGER_HALF_WIDTH = 0.010  # m across it
FINGERS_HALF_LENGTH = MAX_OPENING / 2 + FINGER_THICKNESS
PALM = 0.045  # m from the grip site up to the palm
PALM_HALF_LENGTH = 0.10  # m along the closing axis
PALM_HALF_WIDTH = 0.040  # m across it
WRIST = 0.12  # m from the grip site up to the wrist
WRIST_RADIUS = 0.055  # m
REACH = 0.74  # m from the robot's base: beyond it the elbow locks with the gripper pointing down

RIM_DEPTH = 0.022  # m below an object's top for the grip site on a wall
BODY_DEPTH = 0.035  # m below it on a whole object
WALL = 0.025  # m: up to here a stretch is a wall, and a thinner one is no better
SPARE = 0.006  # m of opening that must remain
PROFILE_STEP = 0.002  # m
WEDGE = 0.008  # m: up to here faces count as parallel
MAX_WEDGE = 0.03  # m: beyond it the fingers slide off a corner
# Parts of an object's radius: how far from its middle it is held where things are in the way there.
BESIDE = (-0.75, -0.6, -0.45, -0.3, 0.3, 0.45, 0.6, 0.75)
# A bowl is held at the side towards the robot's middle line, and not at its far half, by a margin: where millimetres
# decide that no camera can tell, demonstrations contradict each other, and who learns from them aims between two sides.
MIDDLE = 20.0  # /m^2
FAR, FAR_SIDE = 0.6, 0.005  # from how many m beyond the middle
LOPSIDED = 0.01  # m from the middle of an object to its mass, beyond which it is held by that: it has a handle
TOUCHES = 0.005  # m of intrusion that counts as in the way


@dataclass(frozen=True)
class Grasp:
    """position: (3,) m, the grip site in the world frame.  yaw: rad in [-pi/2, pi/2), the gripper's turn about z.

    width: m between the fingers when they touch.  intrusion: m by which things are in the way.
    score: lower is better.
    """

    position: np.ndarray
    yaw: float
    width: float
    intrusion: float
    score: float


@dataclass(frozen=True)
class Scene:
    """What the search looks at: a model and its data, the object's body, and (ngeom,) bool masks.

    own: the object's geoms.  others: everything else but the robot.
    """

    model: Any
    data: Any
    body: int
    own: np.ndarray
    others: np.ndarray

    def heights(self, xy: np.ndarray, own: bool = True, others: bool = True) -> np.ndarray:
        """(n,) m, see `sim.expert.geometry.heights`, of the object, of everything else, or of both."""
        return heights(self.model, self.data, xy, (self.own & own) | (self.others & others))


def stretches(profile: np.ndarray, level: float) -> list[tuple[int, int]]:
    """Half-open index ranges in which `profile`, (n,), is above `level`."""
    above = np.concatenate([[False], profile > level, [False]])
    edges = np.flatnonzero(above[1:] != above[:-1])
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _candidates(scene: Scene, points: np.ndarray, beside: float) -> Iterator[tuple[np.ndarray, float, float, float]]:
    """(position, yaw, width, wedge) of every stretch that fits between the fingers and does not slide out of them.

    wedge: m by which it is narrower somewhere across the fingers, or slanted.
    beside: by how much of the object's radius the closing axes miss its centre.
    """
    low, high = points.min(0), points.max(0)
    centre = 0.5 * (low + high)[:2]
    mass = scene.data.subtree_com[scene.body][:2]
    if float(np.linalg.norm(mass - centre)) > LOPSIDED:
        centre = mass
    height = float(high[2] - low[2])
    radius = float(np.linalg.norm(points[:, :2] - centre, axis=1).max()) + 2 * PROFILE_STEP
    along = np.arange(-radius, radius, PROFILE_STEP)
    for yaw in np.deg2rad(np.arange(-90.0, 90.0, 7.5)):
        lateral, closing = rotation_about_z(yaw)[:2, 0], rotation_about_z(yaw)[:2, 1]
        middle = centre + beside * radius * lateral
        lines = [
            scene.heights(middle + along[:, None] * closing + side * lateral, others=False)
            for side in (-FINGER_HALF_WIDTH, 0.0, FINGER_HALF_WIDTH)
        ]
        profile = np.max(lines, axis=0)
        for depth, whole in ((RIM_DEPTH, False), (BODY_DEPTH, True)):
            z = max(float(high[2]) - min(depth, 0.5 * height), float(low[2]) + FINGERTIP + 0.001)
            level = z - FINGERTIP
            for start, end in stretches(profile, level):
                width = (end - start) * PROFILE_STEP
                place = middle + 0.5 * (along[start] + along[end - 1]) * closing
                contains_centre = along[start] <= 0 <= along[end - 1]
                widths = [float((line[start:end] > level).sum()) * PROFILE_STEP for line in lines]
                wedge = width - min(widths)
                if contains_centre == whole and width < MAX_OPENING - SPARE and wedge < MAX_WEDGE and widths[1] > 0:
                    yield np.array([*place, z]), float(yaw), width, wedge


def _intrusion(scene: Scene, position: np.ndarray, yaw: float, own: bool) -> float:
    """Metres by which things rise into the fingers, as far as they sweep, the palm and the wrist, added up.

    own: whether the object counts, where the open fingers come down beside it.
    """
    lateral, closing = rotation_about_z(yaw)[:2, 0], rotation_about_z(yaw)[:2, 1]

    def highest(along: np.ndarray, half_width: float, own: bool) -> float:
        sides = np.linspace(-half_width, half_width, 5)
        both = np.concatenate([-along, along])
        places = np.array([position[:2] + a * closing + b * lateral for a in both for b in sides])
        return float(scene.heights(places, own=own).max())

    opened = MAX_OPENING / 2 + np.linspace(0, FINGER_THICKNESS, 3)
    swept = np.linspace(0, FINGERS_HALF_LENGTH, 7)
    fingers = max(highest(opened, FINGER_HALF_WIDTH, own), highest(swept, FINGER_HALF_WIDTH, False))
    palm = highest(np.linspace(0.0, PALM_HALF_LENGTH, 6), PALM_HALF_WIDTH, False)
    wrist = float(scene.heights(corridor(position[:2], position[:2], WRIST_RADIUS), own=False).max())
    tops = np.array([fingers, palm, wrist])
    return float(np.maximum(tops - position[2] - [-FINGERTIP - 0.003, PALM, WRIST], 0.0).sum())


def find_grasp(scene: Scene, hand: np.ndarray, base: np.ndarray, move: np.ndarray, container: bool) -> Grasp | None:
    """The best grasp of the scene's object: clear of everything here and where the object goes, within reach, narrow,
    near, towards the robot's middle line, and with little turning of the wrist.

    hand, base: (2,) m, where the gripper and the robot's base are.  move: (3,) m, by which the object will be carried.
    container: whether it goes into something; its walls are left out, since the object may drop in from above them.
    None: every side is wider than the open gripper, or slides out of it.
    """
    points = body_points(scene.model, scene.data, scene.body)
    centre = 0.5 * (points.min(0) + points.max(0))

    def assess(position: np.ndarray, yaw: float, width: float, wedge: float) -> Grasp:
        reach = max(float(np.linalg.norm(place[:2] - base)) for place in (position, position + move))
        intrusion = _intrusion(scene, position, yaw, own=True)
        if not container:
            intrusion += _intrusion(scene, position + move, yaw, own=False)
        score = (
            150.0 * intrusion
            + 25.0 * max(0.0, reach - REACH)
            + 100.0 * (max(0.0, width - WALL) + max(0.0, wedge - WEDGE))
            + 0.5 * abs(yaw)
            + MIDDLE * float(position[1] - base[1]) ** 2
            + FAR * bool(position[0] - centre[0] > FAR_SIDE)
            + 0.15 * float(np.linalg.norm(position[:2] - hand))
        )
        return Grasp(position, yaw, width, intrusion, score)

    def best(*besides: float) -> Grasp | None:
        found = [assess(*candidate) for beside in besides for candidate in _candidates(scene, points, beside)]
        return min(found, key=lambda grasp: grasp.score, default=None)

    central = best(0.0)
    if central is not None and central.intrusion < TOUCHES:
        return central
    others = [grasp for grasp in (central, best(*BESIDE)) if grasp is not None]
    return min(others, key=lambda grasp: grasp.score, default=None)
