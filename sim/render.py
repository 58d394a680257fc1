"""Camera images of a MuJoCo scene.

Each renderer makes its own OpenGL context current before it draws, so several may live in one process. robosuite's own
renderer does not: beside a second context it draws garbage, so compare with it from another process.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from sim.errors import ConfigurationError

RENDERERS = ("official", "fast")
# robosuite makes its context at this size and renders into a corner of it.
_CONTEXT_WIDTH, _CONTEXT_HEIGHT = 640, 480


class OfficialRenderer:
    """The images of robosuite 1.4, pixel by pixel: reflections, shadows, 4 samples a pixel."""

    name = "official"

    def __init__(self, model: Any, data: Any, gl: str) -> None:
        """model, data: mujoco.MjModel and MjData.  gl: "osmesa" or "egl"."""
        import mujoco

        self._mujoco = mujoco
        self.model, self.data = model, data
        self._gl = importlib.import_module(f"mujoco.{gl}").GLContext(_CONTEXT_WIDTH, _CONTEXT_HEIGHT)
        self._gl.make_current()
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._option = mujoco.MjvOption()
        self._option.geomgroup[0] = 0  # collision geoms
        self._option.geomgroup[1] = 1  # visual geoms
        self._perturb = mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._context = self._make_context()

    def _make_context(self) -> Any:
        context = self._mujoco.MjrContext(self.model, self._mujoco.mjtFontScale.mjFONTSCALE_150)
        self._mujoco.mjr_setBuffer(self._mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
        return context

    def render(self, camera: int, size: int) -> np.ndarray:
        """One image: (size, size, 3) uint8 RGB, bottom row first as OpenGL has it.  camera: MuJoCo's camera number."""
        return self._draw(camera, size)

    def _draw(self, camera: int, size: int, depth: np.ndarray | None = None) -> np.ndarray:
        """Draws what the visualisation options let through; `depth` (size, size) float32 is filled where given."""
        mujoco = self._mujoco
        self._gl.make_current()
        if size > self._context.offWidth or size > self._context.offHeight:
            self.model.vis.global_.offwidth = max(size, self.model.vis.global_.offwidth)
            self.model.vis.global_.offheight = max(size, self.model.vis.global_.offheight)
            self._context.free()
            self._context = self._make_context()
        self._camera.fixedcamid = camera
        mujoco.mjv_updateScene(
            self.model, self.data, self._option, self._perturb, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        viewport = mujoco.MjrRect(0, 0, size, size)
        mujoco.mjr_render(viewport, self._scene, self._context)
        image = np.empty((size, size, 3), np.uint8)
        mujoco.mjr_readPixels(image, depth, viewport, self._context)
        return image

    def gl_renderer(self) -> str:
        """GL_RENDERER, such as "llvmpipe (LLVM 15.0.6, 256 bits)"."""
        from OpenGL import GL

        self._gl.make_current()
        return GL.glGetString(GL.GL_RENDERER).decode()

    def close(self) -> None:
        """Frees the OpenGL context; a second call does nothing."""
        if self._gl is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._gl = None


def make_renderer(name: str, model: Any, data: Any, gl: str) -> OfficialRenderer:
    """The renderer called `name`, for one scene.  gl: "osmesa" or "egl"."""
    check_renderer(name)
    if name == "official":
        return OfficialRenderer(model, data, gl)
    from sim.fast_render import FastRenderer

    return FastRenderer(model, data, gl)


def check_renderer(name: str) -> None:
    """Raises ConfigurationError unless `name` is a renderer."""
    if name not in RENDERERS:
        raise ConfigurationError(f"no renderer is called {name!r}; choose one of: {', '.join(RENDERERS)}")
