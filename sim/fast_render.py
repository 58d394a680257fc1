"""The same scene without reflections, shadows and multisampling, drawing as little of it as gives the same pixels.

Two savings, both exact. Geoms outside the camera's view are not drawn. And where a camera stands still, what stands
still in front of it is drawn once, colour and depth, and each frame draws the rest and merges the two by depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sim.render import OfficialRenderer

_HIDDEN_GROUP = 5
_MARGIN = 1e-4  # metres by which a geom may miss the view and still be drawn: far above float32's rounding
_MAX_PATIENCE = 64  # frames
_WORTH_REDRAWING = 4000  # faces that a new still layer must take over from the frames


@dataclass
class _StillLayer:
    """What one fixed camera sees of the geoms that do not move.

    Arrays over the drawn geoms: pose (n, 12) float32 as OpenGL gets it, in the last frame; members; patience: frames
    a geom must rest before it may (re)join, doubled whenever it breaks the layer; rested: frames since it moved.
    image, depth: (size, size, 3) uint8 and (size, size) float32, larger is nearer.
    glazed: (size, size) bool, where a transparent member shows; None without such a member.
    bare_depth, glass_depth: (size, size) float32, the depths of the other members and of the transparent ones.
    """

    camera_pose: np.ndarray
    pose: np.ndarray
    members: np.ndarray
    patience: np.ndarray
    rested: np.ndarray
    image: np.ndarray = field(default_factory=lambda: np.empty(0))
    depth: np.ndarray = field(default_factory=lambda: np.empty(0))
    glazed: np.ndarray | None = None
    bare_depth: np.ndarray = field(default_factory=lambda: np.empty(0))
    glass_depth: np.ndarray = field(default_factory=lambda: np.empty(0))

    def tints(self, depth: np.ndarray) -> bool:
        """Whether anything at `depth` (size, size) stands between a transparent member and what is behind it."""
        if self.glazed is None:
            return False
        return bool((self.glazed & (depth > self.bare_depth) & (depth <= self.glass_depth)).any())


class FastRenderer(OfficialRenderer):
    """Plain images: they differ from the official ones, so a policy is trained and evaluated on one kind."""

    name = "fast"

    def __init__(self, model: Any, data: Any, gl: str) -> None:
        """model, data: mujoco.MjModel and MjData.  gl: "osmesa" or "egl"."""
        super().__init__(model, data, gl)
        flags = self._mujoco.mjtRndFlag
        self._scene.flags[flags.mjRND_REFLECTION] = 0
        self._scene.flags[flags.mjRND_SHADOW] = 0
        self._option.geomgroup[_HIDDEN_GROUP] = 0
        self._option.sitegroup[_HIDDEN_GROUP] = 0
        self.cull = True  # for tests that compare
        self.layered = True
        self._geoms = np.flatnonzero(self._option.geomgroup[model.geom_group])
        self._groups = model.geom_group[self._geoms].copy()
        self._site_groups = model.site_group.copy()
        # A plane has no size to cull by.
        self._bounded = model.geom_rbound[self._geoms] > 0
        self._box_centre, self._box_half = model.geom_aabb[self._geoms, :3], model.geom_aabb[self._geoms, 3:]
        mesh = np.where(
            model.geom_type[self._geoms] == self._mujoco.mjtGeom.mjGEOM_MESH, model.geom_dataid[self._geoms], -1
        )
        self._faces = np.where(mesh >= 0, model.mesh_facenum[mesh] if model.nmesh else 0, 100)
        material = model.geom_matid[self._geoms]
        alpha = np.where(
            material >= 0, model.mat_rgba[material, 3] if model.nmat else 1, model.geom_rgba[self._geoms, 3]
        )
        self._clear = (alpha > 0) & (alpha < 1)
        self._layerable = model.ntendon == model.nskin == model.nflex == 0  # these have no pose to compare
        self._layers: dict[tuple[int, int], _StillLayer] = {}

    def _make_context(self) -> Any:
        # MuJoCo reads the number of samples from the model, which may serve an official renderer as well.
        quality = self.model.vis.quality
        samples, quality.offsamples = quality.offsamples, 0
        try:
            context = super()._make_context()
        finally:
            quality.offsamples = samples
        # Depth as the buffer holds it, 0 at infinity: subtracting from 1 would round distant depths together.
        context.readDepthMap = self._mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        return context

    def render(self, camera: int, size: int) -> np.ndarray:
        """One image: (size, size, 3) uint8 RGB, bottom row first as OpenGL has it.  camera: MuJoCo's camera number."""
        model = self.model
        seen = self._in_view(camera) if self.cull else np.ones(len(self._geoms), bool)
        alpha = model.site_rgba[:, 3]
        sites = alpha > 0
        clear_sites = bool(((alpha > 0) & (alpha < 1)).any())
        still_camera = model.body_weldid[model.cam_bodyid[camera]] == 0
        if not (self.layered and self._layerable and still_camera) or clear_sites:
            return self._draw_only(camera, size, seen, sites)
        return self._draw_layered(camera, size, seen, sites)

    def _in_view(self, camera: int) -> np.ndarray:
        """Which drawn geoms' bounding boxes reach into the camera's pyramid: (n,) bool, true where in doubt."""
        data = self.data
        turn, eye = data.cam_xmat[camera].reshape(3, 3), data.cam_xpos[camera]
        half = math.radians(float(self.model.cam_fovy[camera])) / 2
        side, ahead = math.cos(half), -math.sin(half)
        # Inward normals of the four sides and of the plane through the eye; a camera looks along its own -z.
        normals = (
            np.array([[side, 0, ahead], [-side, 0, ahead], [0, side, ahead], [0, -side, ahead], [0, 0, -1]]) @ turn.T
        )
        axes = data.geom_xmat[self._geoms].reshape(-1, 3, 3)
        centre = data.geom_xpos[self._geoms] + np.einsum("nij,nj->ni", axes, self._box_centre) - eye
        reach = np.einsum("npj,nj->np", np.abs(np.einsum("pi,nij->npj", normals, axes)), self._box_half)
        return (centre @ normals.T + reach > -_MARGIN).all(axis=1) | ~self._bounded

    def _draw_only(
        self, camera: int, size: int, geoms: np.ndarray, sites: np.ndarray | None, depth: np.ndarray | None = None
    ) -> np.ndarray:
        """Draws some of the geoms and sites: masks over the drawn geoms and over all sites (None is none)."""
        model = self.model
        model.geom_group[self._geoms] = np.where(geoms, self._groups, _HIDDEN_GROUP)
        model.site_group[:] = _HIDDEN_GROUP if sites is None else np.where(sites, self._site_groups, _HIDDEN_GROUP)
        try:
            return self._draw(camera, size, depth)
        finally:
            model.geom_group[self._geoms] = self._groups
            model.site_group[:] = self._site_groups

    def _draw_layered(self, camera: int, size: int, seen: np.ndarray, sites: np.ndarray) -> np.ndarray:
        data, geoms = self.data, self._geoms
        pose = np.concatenate([data.geom_xpos[geoms], data.geom_xmat[geoms]], axis=1).astype(np.float32)
        view = [data.cam_xpos[camera], data.cam_xmat[camera], data.light_xpos.ravel(), data.light_xdir.ravel()]
        camera_pose = np.concatenate(view)
        layer = self._layers.get((camera, size))
        if layer is None or not np.array_equal(layer.camera_pose, camera_pose):
            none, patient = np.zeros(len(geoms), bool), np.ones(len(geoms), int)
            self._layers[camera, size] = _StillLayer(camera_pose, pose, none, patient, np.zeros(len(geoms), int))
            return self._draw_only(camera, size, seen, sites)
        moved = (pose != layer.pose).any(axis=1)
        layer.pose = pose
        layer.rested = np.where(moved, 0, layer.rested + 1)
        broken = moved & layer.members
        glass = seen & self._clear
        layer.patience[broken] = np.minimum(2 * layer.patience[broken], _MAX_PATIENCE)
        resting = layer.rested >= layer.patience
        joining = resting & seen & ~layer.members
        if broken.any() or self._faces[joining].sum() >= _WORTH_REDRAWING or (joining & glass).any():
            self._draw_still(layer, camera, size, resting & seen)
        if not layer.members.any() or (glass & ~layer.members).any():
            return self._draw_only(camera, size, seen, sites)
        depth = np.empty((size, size), np.float32)
        self._scene.flags[self._mujoco.mjtRndFlag.mjRND_SKYBOX] = 0
        try:
            image = self._draw_only(camera, size, seen & ~layer.members, sites, depth)
        finally:
            self._scene.flags[self._mujoco.mjtRndFlag.mjRND_SKYBOX] = 1
        if layer.tints(depth):  # only drawing both together tints it right
            return self._draw_only(camera, size, seen, sites)
        return np.where((depth > layer.depth)[..., None], image, layer.image)

    def _draw_still(self, layer: _StillLayer, camera: int, size: int, members: np.ndarray) -> None:
        layer.members, layer.glazed = members, None
        layer.depth = np.empty((size, size), np.float32)
        layer.image = self._draw_only(camera, size, members, None, layer.depth)
        if (members & self._clear).any():
            layer.bare_depth = np.empty((size, size), np.float32)
            bare = self._draw_only(camera, size, members & ~self._clear, None, layer.bare_depth)
            layer.glazed = (bare != layer.image).any(axis=2) | (layer.bare_depth != layer.depth)
            layer.glass_depth = self._glass_depth(camera, size, members & self._clear)

    def _glass_depth(self, camera: int, size: int, glass: np.ndarray) -> np.ndarray:
        """Depth of transparent geoms, which OpenGL leaves out of the depth buffer unless they are made opaque."""
        model, depth = self.model, np.empty((size, size), np.float32)
        materials, geoms = model.mat_rgba.copy(), model.geom_rgba.copy()
        model.mat_rgba[:, 3] = model.geom_rgba[:, 3] = 1
        try:
            self._draw_only(camera, size, glass, None, depth)
        finally:
            model.mat_rgba[:], model.geom_rgba[:] = materials, geoms
        return depth
