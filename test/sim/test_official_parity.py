"""The official renderer and protocol against LIBERO's own environment, bit for bit."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sim.bench import sample_actions
from sim.env import EnvConfig, LiberoEnv
from sim.world import select_gl

# Fixtures on a table, and a crowded floor whose contacts show every last bit.
TASKS = (("libero_goal", 0), ("libero_object", 2))
SEED, SIZE = 7, 64
INIT_STATES = (5, 2)
SEEN = ("states", "proprio", "agentview", "robot0_eye_in_hand")


@pytest.fixture(scope="module")
def actions() -> np.ndarray:
    return sample_actions(30)[15:25]  # turns, then pure translations, open and closed gripper


@pytest.fixture(scope="module", params=TASKS, ids=lambda task: f"{task[0]}-{task[1]}")
def task(request: pytest.FixtureRequest) -> tuple[str, int]:
    return request.param


@pytest.fixture(scope="module")
def reference(
    task: tuple[str, int], actions: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    select_gl(None)  # the child renders with this process's library
    folder = tmp_path_factory.mktemp("reference")
    np.save(folder / "actions.npy", actions)
    script = Path(__file__).with_name("reference_episode.py")
    arguments = [*task, SEED, SIZE, folder / "actions.npy", folder / "out.npz", *INIT_STATES]
    command = [sys.executable, script, *arguments]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    with np.load(folder / "out.npz") as saved:
        return dict(saved)


@pytest.fixture(scope="module", params=["official", "fast"])
def played(request: pytest.FixtureRequest, task: tuple[str, int], actions: np.ndarray) -> dict[str, np.ndarray]:
    env = LiberoEnv(EnvConfig(suite=task[0], task=task[1], seed=SEED, image_size=SIZE, stepper=request.param))
    seen: dict[str, list[np.ndarray]] = {name: [] for name in SEEN}

    def save(observation: dict[str, dict[str, np.ndarray]]) -> None:
        seen["states"].append(env.state())
        seen["proprio"].append(np.concatenate(list(observation["proprio"].values())))
        for camera, image in observation["images"].items():
            seen[camera].append(image)

    for init_state in INIT_STATES:
        save(env.reset(options={"init_state": init_state})[0])
        for action in actions:
            save(env.step(action)[0])
    env.close()
    return {name: np.array(values) for name, values in seen.items()}


@pytest.mark.parametrize("kind", SEEN)
def test_an_official_episode_is_libero_s_own(
    kind: str, reference: dict[str, np.ndarray], played: dict[str, np.ndarray]
) -> None:
    np.testing.assert_array_equal(played[kind], reference[kind])
