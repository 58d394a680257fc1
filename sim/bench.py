"""What a control step and a camera image cost here: official against fast, on the same scene, in CPU time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from sim.errors import ConfigurationError
from sim.render import RENDERERS, OfficialRenderer, make_renderer
from sim.stepping import STEPPERS
from sim.tasks import check_suite, find_task, load_init_states
from sim.versions import provenance
from sim.world import World

_WARM_UP = 3  # steps: compiled code is loaded and textures are uploaded


@dataclass(frozen=True)
class BenchConfig:
    """What to measure.

    suite, task: see `sim.tasks.find_task`.  steps: control steps measured, of each kind.
    cameras, image_size (pixels), gl: as in `sim.env.EnvConfig`.  init_state: number of the official initial state.
    """

    suite: str = "libero_spatial"
    task: int | str = 0
    steps: int = 60
    cameras: tuple[str, ...] = ("agentview", "robot0_eye_in_hand")
    image_size: int = 128
    gl: str | None = None
    init_state: int = 0

    def __post_init__(self) -> None:
        check_suite(self.suite)
        if not 1 <= self.steps <= 10_000:
            raise ConfigurationError(f"BenchConfig.steps is {self.steps}: it must be from 1 to 10000")
        if not 1 <= self.image_size <= 4096:
            raise ConfigurationError(f"BenchConfig.image_size is {self.image_size}: it must be from 1 to 4096")


def sample_actions(steps: int, seed: int = 0) -> np.ndarray:
    """(steps, 7) float32 in [-1, 1]: reaches and turns of half a second, the gripper closing and opening by turns."""
    rng = np.random.default_rng(seed)
    goals = rng.uniform(-1, 1, (steps // 10 + 1, 6)) * [0.8, 0.8, 0.6, 0.3, 0.3, 0.5] + [0, 0, -0.3, 0, 0, 0]
    arm = np.repeat(goals, 10, axis=0)[:steps] + rng.normal(0, 0.05, (steps, 6))
    arm[20:30, 3:] = 0  # a goal orientation is kept, not set, where no turn is commanded
    gripper = np.where(np.arange(steps) // 25 % 2 == 0, -1, 1)
    return np.clip(np.column_stack([arm, gripper]), -1, 1).astype(np.float32)


def measure(config: BenchConfig | None = None) -> dict[str, Any]:
    """Measures and compares; a dictionary that JSON can hold.

    "step" and "render" (per camera) hold, for "official" and "fast", the median and mean milliseconds of process CPU
    time and n; "ratio" is fast over official, of the means. "max_state_difference" is over time, qpos and qvel of every
    step; "mean_pixel_difference" is of 255, between the two renderers' images.
    Raises ConfigurationError: unknown suite, task, camera or initial state.
    """
    config = config or BenchConfig()
    task = find_task(config.suite, config.task)
    states = load_init_states(task)
    if not 0 <= config.init_state < len(states):
        raise ConfigurationError(f"no initial state {config.init_state}; choose 0 to {len(states) - 1}")
    world = World(task, config.gl)
    try:
        renderers = {name: make_renderer(name, world.model, world.data, world.gl) for name in RENDERERS}
        try:
            step = _measure_steps(world, states[config.init_state], config)
            render = _measure_images(world, states[config.init_state], renderers, config)
            made_by = provenance(gl=world.gl, gl_renderer=renderers["fast"].gl_renderer())
        finally:
            for renderer in renderers.values():
                renderer.close()
    finally:
        world.close()
    return {
        "suite": task.suite,
        "task": task.index,
        "image_size": config.image_size,
        "step": step,
        "render": render,
        "provenance": made_by,
    }


def _cpu_ms(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return (time.process_time() - started) * 1e3


def _summary(times: dict[str, list[float]]) -> dict[str, Any]:
    kinds = {
        name: {"median_ms": round(float(np.median(ms)), 3), "mean_ms": round(float(np.mean(ms)), 3), "n": len(ms)}
        for name, ms in times.items()
    }
    return {**kinds, "ratio": round(float(np.mean(times["fast"]) / np.mean(times["official"])), 4)}


def _measure_steps(world: World, init_state: np.ndarray, config: BenchConfig) -> dict[str, Any]:
    times: dict[str, list[float]] = {}
    states: dict[str, list[np.ndarray]] = {}
    for name, kind in STEPPERS.items():
        stepper = kind(world)
        world.reset(0, init_state)
        times[name], states[name] = [], []
        for action in sample_actions(config.steps + _WARM_UP).astype(np.float64):
            times[name].append(_cpu_ms(partial(stepper.step, action)))
            states[name].append(world.state())
        del times[name][:_WARM_UP]
    difference = np.abs(np.array(states["fast"]) - np.array(states["official"])).max()
    return {**_summary(times), "max_state_difference": float(difference)}


def _measure_images(
    world: World, init_state: np.ndarray, renderers: dict[str, OfficialRenderer], config: BenchConfig
) -> dict[str, Any]:
    world.reset(0, init_state)
    stepper = STEPPERS["fast"](world)
    numbers = {camera: world.camera(camera) for camera in config.cameras}
    times: dict[str, dict[str, list[float]]] = {camera: {name: [] for name in RENDERERS} for camera in numbers}
    differences: dict[str, list[float]] = {camera: [] for camera in numbers}
    images: dict[str, np.ndarray] = {}

    def draw(name: str, number: int) -> None:
        images[name] = renderers[name].render(number, config.image_size)

    for done, action in enumerate(sample_actions(config.steps + _WARM_UP).astype(np.float64)):
        stepper.step(action)
        for camera, number in numbers.items():
            for name in RENDERERS:
                elapsed = _cpu_ms(partial(draw, name, number))
                if done >= _WARM_UP:
                    times[camera][name].append(elapsed)
            differences[camera].append(float(np.abs(images["fast"].astype(int) - images["official"]).mean()))
    return {
        camera: {**_summary(times[camera]), "mean_pixel_difference": round(float(np.mean(differences[camera])), 3)}
        for camera in numbers
    }
