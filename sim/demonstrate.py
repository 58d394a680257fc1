"""One episode in which somebody acts and the expert says, in every state, what it would have done."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm.demonstrations import LOST, WIDTHS, Demonstration
from sim.env import LiberoEnv
from sim.executor import Executor
from sim.expert import make_expert
from sim.tasks import SUITES
from sim.world import CONTROL_FREQ, Privileged

# Steps in a row in which the expert knows of nothing to do, after which there is nothing more to learn; our choice.
LOST_LIMIT = 20


def demonstrate(env: LiberoEnv, executor: Executor, seed: int, draw: str = "sampled") -> Demonstration:
    """An episode from a start that `seed` draws, see `sim.tasks.DRAWS`: `executor` acts, the expert labels.

    It follows from its arguments alone: the executor draws from a generator of this seed and task.
    Raises what the expert, the executor or the environment raises.
    """
    observation, _ = env.reset(seed=seed, options={"init_state": draw})
    task = env.task
    expert = make_expert(env)
    expert.reset(task.language)
    executor.reset(task.language, np.random.default_rng([seed, SUITES.index(task.suite), task.index]))
    images: dict[str, list[np.ndarray]] = {name: [] for name in env.config.cameras}
    proprio: dict[str, list[np.ndarray]] = {name: [] for name in WIDTHS}
    labels, executed, states, targets, phases = [], [], [], [], []  # type: ignore[var-annotated]
    privileged = env.privileged()
    named = object_words(privileged)
    cameras = [privileged.model.camera(name).id for name in env.config.cameras]
    objects: dict[str, list[np.ndarray]] = {name: [] for name in named}
    done = success = False
    while not done:
        seen = env.observation_for_policy(observation)
        labels.append(np.asarray(expert.act(seen).action, np.float64))
        executed.append(np.asarray(executor.executed(labels[-1], seen, len(phases)), np.float64))
        states.append(env.state())
        targets.append(expert.targets)
        phases.append(expert.phase)
        for name, body in named.items():
            objects[name].append(places_in_images(privileged, cameras, body))
        for name, frames in images.items():
            frames.append(seen.images[name])
        for name, values in proprio.items():
            values.append(seen.proprio[name])
        observation, _, success, truncated, _ = env.step(executed[-1])
        done = success or truncated or phases[-LOST_LIMIT:] == [LOST] * LOST_LIMIT
    names = tuple(dict.fromkeys(phases))
    return Demonstration(
        images={name: np.stack(frames) for name, frames in images.items()},
        proprio={name: np.array(values) for name, values in proprio.items()},
        actions=np.array(labels),
        executed=np.array(executed),
        states=np.array(states),
        targets=np.array(targets, np.float32),
        phases=np.array([names.index(phase) for phase in phases], np.int8),
        phase_names=names,
        instruction=task.language,
        suite=task.suite,
        task=task.index,
        seed=seed,
        outcome="success" if success else "failure",
        source=executor.source,
        objects={name: np.array(places) for name, places in objects.items()},
        env_args=_env_args(env),
        provenance=env.provenance(),
    )


def object_words(privileged: Privileged) -> dict[str, int]:
    """Name in words -> body, of everything movable that there is one of: alphabet_soup_1 is "alphabet soup"."""
    movable = privileged.movable
    words = {name: name.rpartition("_")[0].replace("_", " ") for name in movable}
    counted = Counter(words.values())
    return {words[name]: body for name, body in movable.items() if counted[words[name]] == 1}


def places_in_images(privileged: Privileged, cameras: Sequence[int], body: int) -> np.ndarray:
    """(cameras, 2) float32: row and column of a body's origin as shares of the height and width of a square image.

    NaN where it lies outside, or behind the camera. What hides it does not count.
    """
    model, data = privileged.model, privileged.data
    found = np.full((len(cameras), 2), np.nan, np.float32)
    for place, camera in enumerate(cameras):
        x, y, z = data.cam_xmat[camera].reshape(3, 3).T @ (data.xpos[body] - data.cam_xpos[camera])
        if z < 0:  # a camera looks along its own -z, with y upwards
            size = -2 * z * math.tan(math.radians(model.cam_fovy[camera]) / 2)
            share = np.array([0.5 - y / size, 0.5 + x / size])
            if (share >= 0).all() and (share <= 1).all():
                found[place] = share
    return found


def _env_args(env: LiberoEnv) -> dict[str, Any]:
    """What robomimic makes the environment from, as LIBERO writes it."""
    problem = env.privileged().domain.parsed_problem["problem_name"]
    bddl = f"{env.task.bddl_file.parent.name}/{env.task.bddl_file.name}"
    size = env.config.image_size
    return {
        "type": 1,
        "env_name": problem,
        "problem_name": problem,
        "bddl_file": bddl,
        "env_kwargs": {
            "robots": ["Panda"],
            "camera_names": list(env.config.cameras),
            "camera_heights": size,
            "camera_widths": size,
            "control_freq": CONTROL_FREQ,
            "bddl_file_name": bddl,
        },
    }
