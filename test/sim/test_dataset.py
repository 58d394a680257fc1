"""The folder of a collection: what it remembers, what it refuses, and that LIBERO's file leads into it."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest

from mllm.demonstrations import write_demonstration
from mllm.errors import PolicyError
from sim.dataset import Attempt, SuiteFolder
from sim.errors import ConfigurationError

SETTINGS = {"renderer": "fast", "noise": {"clean": 0.25, "kick_steps": (2, 8)}}


@pytest.fixture
def write_episode(make_demonstration):
    def write(folder: SuiteFolder, task: int, seed: int, steps: int = 3) -> None:
        actions = np.full((steps, 7), seed / 100)
        write_demonstration(folder.episode(task, seed), make_demonstration(steps, seed, size=8, actions=actions))

    return write


@pytest.fixture
def folder(tmp_path):
    made = SuiteFolder(tmp_path, "libero_goal")
    with made.locked():
        made.begin(SETTINGS, [0, 8])
    return made


def reopened(folder: SuiteFolder, settings: dict = SETTINGS) -> SuiteFolder:
    again = SuiteFolder(folder.path.parent, folder.suite)
    again.begin(settings, [0, 8])
    return again


def test_what_was_kept_or_failed_is_finished_and_an_error_is_not(folder, write_episode):
    write_episode(folder, 8, 5)
    folder.record(Attempt(8, 5, "success", 3, kept=True))
    folder.record(Attempt(8, 6, "failure", 220))
    folder.record(Attempt(8, 7, "error", error="Traceback: it diverged"))
    again = reopened(folder)
    assert [again.finished(8, seed) for seed in (4, 5, 6, 7)] == [False, True, True, False]
    assert not again.finished(0, 5)
    entry = json.loads(folder.manifest_file.read_text())["tasks"]["8"]
    assert (entry["failures"], entry["errors"]) == ({"6": 220}, {"7": "Traceback: it diverged"})


def test_an_error_that_went_well_the_next_time_is_forgotten(folder, write_episode):
    folder.record(Attempt(0, 1, "error", error="Traceback"))
    again = reopened(folder)
    write_episode(again, 0, 1)
    again.record(Attempt(0, 1, "success", 3, kept=True))
    assert json.loads(folder.manifest_file.read_text())["tasks"]["0"]["errors"] == {}


def test_other_settings_are_refused_by_name(folder):
    with pytest.raises(ConfigurationError, match=r"renderer 'fast', not 'official'.*another folder"):
        reopened(folder, {**SETTINGS, "renderer": "official"})


def test_a_second_collection_in_the_same_folder_is_refused(folder):
    with (
        folder.locked(),
        pytest.raises(ConfigurationError, match="another collection"),
        SuiteFolder(folder.path.parent, "libero_goal").locked(),
    ):
        pass


def test_what_a_kill_left_unfinished_is_removed(folder):
    half = folder.episode(0, 1).with_name(".seed_00000001.hdf5.99.tmp")
    half.write_bytes(b"half")
    reopened(folder)
    assert not half.exists()


def test_a_damaged_episode_is_named_before_any_work(folder):
    folder.episode(0, 9).write_bytes(b"nothing")
    with pytest.raises(PolicyError, match=r"seed_00000009\.hdf5"):
        reopened(folder)


def test_a_manifest_that_cannot_be_read_is_named(folder):
    folder.manifest_file.write_text("{")
    with pytest.raises(ConfigurationError, match=r"manifest\.json"):
        reopened(folder)


def test_the_manifest_has_counts_and_versions(folder, write_episode):
    for seed in (3, 11):
        write_episode(folder, 8, seed, steps=seed)
    again = reopened(folder)
    again.summarise()
    manifest = json.loads(folder.manifest_file.read_text())
    assert (manifest["tasks"]["8"]["demonstrations"], manifest["tasks"]["8"]["frames"]) == (2, 14)
    assert manifest["tasks"]["0"]["demonstrations"] == 0
    assert manifest["tasks"]["8"]["instruction"] == "put the bowl on the plate"
    assert {"mujoco", "robosuite", "libero"} <= manifest["provenance"].keys()


def test_liberos_file_of_a_task_leads_to_every_episode_wherever_the_folder_moves(folder, write_episode, tmp_path):
    for seed in (11, 3):
        write_episode(folder, 8, seed, steps=seed)
    reopened(folder).summarise()
    moved = tmp_path / "elsewhere"
    folder.path.rename(moved)
    with h5py.File(moved / "put_the_bowl_on_the_plate_demo.hdf5") as file:
        data = file["data"]
        assert (data.attrs["num_demos"], data.attrs["total"]) == (2, 14)
        assert json.loads(data.attrs["problem_info"])["language_instruction"] == "put the bowl on the plate"
        assert [data[f"demo_{i}"].attrs["num_samples"] for i in range(2)] == [3, 11]
        assert data["demo_1/actions"][0, 0] == 0.11
        assert data["demo_0/obs/agentview_rgb"].shape == (3, 8, 8, 3)
    assert not list(moved.glob("open_the_middle_drawer*.hdf5"))
