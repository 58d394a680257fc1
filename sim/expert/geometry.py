"""Where bodies are and how high the scene stands, read from MuJoCo's collision geometry.

Collision geometry is what robosuite puts into geom group 0. Lengths are metres in the world frame.
"""

from __future__ import annotations

import math
from typing import Any

import mujoco
import numpy as np

COLLISION_GROUP = 0
_HIDDEN_GROUP = 5
_CIRCLE = [(math.cos(angle), math.sin(angle)) for angle in np.linspace(0, 2 * math.pi, 24, endpoint=False)]
_CUBE = [(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]


def geoms_of(model: Any, root: int) -> np.ndarray:
    """(ngeom,) bool: geoms of body `root` and of every body below it."""
    below = np.zeros(model.nbody, bool)
    below[root] = True
    for body in range(root + 1, model.nbody):  # parents come before their children
        below[body] = below[body] or below[model.body_parentid[body]]
    return below[model.geom_bodyid]


def _local_points(model: Any, geom: int) -> np.ndarray:
    """(n, 3) points that span a geom, in its own frame; none for the endless kinds (planes, height fields)."""
    size, kind = model.geom_size[geom], model.geom_type[geom]
    shapes = mujoco.mjtGeom
    if kind == shapes.mjGEOM_BOX:
        return np.array(_CUBE) * size
    if kind == shapes.mjGEOM_CYLINDER:
        return np.array([(x * size[0], y * size[0], end * size[1]) for x, y in _CIRCLE for end in (-1, 1)])
    if kind == shapes.mjGEOM_CAPSULE:
        ends = [(0.0, 0.0, end * (size[1] + size[0])) for end in (-1, 1)]
        return np.array([(x * size[0], y * size[0], end * size[1]) for x, y in _CIRCLE for end in (-1, 1)] + ends)
    if kind in (shapes.mjGEOM_SPHERE, shapes.mjGEOM_ELLIPSOID):
        radii = size if kind == shapes.mjGEOM_ELLIPSOID else np.full(3, size[0])
        return np.concatenate([np.eye(3), -np.eye(3)]) * radii
    if kind == shapes.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        start = model.mesh_vertadr[mesh]
        return np.array(model.mesh_vert[start : start + model.mesh_vertnum[mesh]], np.float64)
    return np.zeros((0, 3))


def body_points(model: Any, data: Any, root: int) -> np.ndarray:
    """(n, 3) points that span the collision geoms of `root`: corners, rims and vertices.

    Raises ValueError: the body has none.
    """
    points = [
        _local_points(model, int(geom)) @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom]
        for geom in np.flatnonzero(geoms_of(model, root) & (model.geom_group == COLLISION_GROUP))
    ]
    if sum(map(len, points)) == 0:
        raise ValueError(f"body {model.body(root).name!r} has no collision geometry")
    return np.concatenate(points)


def heights(model: Any, data: Any, xy: np.ndarray, seen: np.ndarray, top: float = 2.0) -> np.ndarray:
    """(n,) height of the first surface below z = `top` at each of the (n, 2) places; -inf where there is none.

    seen: (ngeom,) bool, the geoms that count; only their collision geometry does.
    """
    groups, colours = model.geom_group.copy(), model.geom_rgba.copy()
    mask = np.zeros(mujoco.mjNGROUP, np.uint8)
    mask[COLLISION_GROUP] = 1
    down, hit = np.array([0.0, 0.0, -1.0]), np.zeros(1, np.int32)
    found = np.full(len(xy), -np.inf)
    try:
        # Rays leave out groups, so what must not count changes its group meanwhile; and they pass through transparent
        # geoms, which the collision boxes of some objects are.
        model.geom_group[~seen] = _HIDDEN_GROUP
        model.geom_rgba[:, 3] = 1.0
        for index, (x, y) in enumerate(xy):
            depth = mujoco.mj_ray(model, data, np.array([x, y, top]), down, mask, 1, -1, hit)
            if depth >= 0:
                found[index] = top - depth
    finally:
        model.geom_group[:], model.geom_rgba[:] = groups, colours
    return found


def corridor(start: np.ndarray, end: np.ndarray, radius: float, spacing: float = 0.02) -> np.ndarray:
    """(n, 2) places that cover everything within `radius` of the way between two (2,) places, `spacing` apart."""
    way = end - start
    steps = max(2, math.ceil(float(np.linalg.norm(way)) / spacing) + 1)
    rings = np.append(np.arange(0, radius - 1e-9, spacing), radius)
    disc = np.array([(r * x, r * y) for r in rings for x, y in (_CIRCLE if r > 0 else [(0.0, 0.0)])[::2]])
    centres = start + np.linspace(0, 1, steps)[:, None] * way
    return (centres[:, None] + disc[None]).reshape(-1, 2)


def rotation_about_z(angle: float) -> np.ndarray:
    """(3, 3) rotation by `angle` rad about the world's z axis."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def rotation_about(axis: np.ndarray, angle: float) -> np.ndarray:
    """(3, 3) rotation by `angle` rad about a unit vector."""
    quat, matrix = np.empty(4), np.empty(9)
    mujoco.mju_axisAngle2Quat(quat, np.asarray(axis, np.float64), angle)
    mujoco.mju_quat2Mat(matrix, quat)
    return matrix.reshape(3, 3)


def heading(rotation: np.ndarray) -> float:
    """The angle about z, rad in (-pi, pi], of the rotation about z that is nearest to a (3, 3) rotation."""
    return math.atan2(rotation[1, 0] - rotation[0, 1], rotation[0, 0] + rotation[1, 1])


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """(3,) axis times angle, rad in [0, pi], of a (3, 3) rotation."""
    quat, vector = np.empty(4), np.empty(3)
    mujoco.mju_mat2Quat(quat, np.ascontiguousarray(rotation, np.float64).ravel())
    mujoco.mju_quat2Vel(vector, quat, 1.0)
    return vector
