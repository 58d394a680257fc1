"""Recordings of the scripted expert, the shipped one included, repeat bit for bit."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mllm.recording import load_recording, save_recording
from mllm.replay import ReplayPolicy
from sim.env import EnvConfig, LiberoEnv
from sim.errors import SimError
from sim.expert import make_expert
from sim.record import record_episode
from sim.rollout import rollout

SHIPPED = Path(__file__).parents[2] / "launch" / "episodes" / "libero_spatial_0.safetensors"


@pytest.fixture(scope="module")
def spatial() -> Iterator[LiberoEnv]:
    env = LiberoEnv(EnvConfig(suite="libero_spatial", task=0, cameras=(), stepper="fast", renderer="fast", seed=0))
    yield env
    env.close()


def test_a_recording_repeats_its_episode_exactly(spatial: LiberoEnv, tmp_path: Path) -> None:
    original = rollout(spatial, make_expert(spatial), init_state=1, record_states=True)
    recording = record_episode(spatial, init_state=1)
    np.testing.assert_array_equal(recording.actions, original.actions)
    save_recording(tmp_path / "episode.safetensors", recording)
    replayed = rollout(spatial, ReplayPolicy(str(tmp_path / "episode.safetensors")), init_state=1, record_states=True)
    assert replayed.outcome == "success"
    np.testing.assert_array_equal(replayed.states, original.states)


def test_a_recording_names_its_episode(spatial: LiberoEnv) -> None:
    metadata = record_episode(spatial, init_state=0).metadata
    assert metadata["suite"] == "libero_spatial"
    assert metadata["task"] == "0"
    assert metadata["init_state"] == "0"
    assert metadata["seed"] == "0"
    assert metadata["instruction"] == spatial.task.language
    assert metadata["renderer"] == "fast"
    assert metadata["stepper"] == "fast"
    assert metadata["settle_steps"] == "10"
    assert metadata["outcome"] == "success"
    assert {"mujoco", "robosuite", "libero"} <= metadata.keys()


def test_the_shipped_episode_still_succeeds(spatial: LiberoEnv) -> None:
    recording = load_recording(SHIPPED)
    replayed = rollout(spatial, ReplayPolicy(str(SHIPPED)), int(recording.metadata["init_state"]), record_states=True)
    assert replayed.error is None
    assert replayed.outcome == "success"
    assert replayed.steps == len(recording.actions) < 130


def test_an_episode_that_fails_is_not_recorded(spatial: LiberoEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spatial, "step_limit", 5)
    with pytest.raises(SimError, match="failure after 5 steps"):
        record_episode(spatial, init_state=0)
