"""The LeRobotDataset v3: its layout by pyarrow and av, and whether lerobot itself opens it where it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import av
import numpy as np
import pytest
from pyarrow import parquet

from mllm import lerobot
from mllm.demonstrations import axis_angle, write_demonstration
from mllm.errors import PolicyError
from mllm.lerobot import Exported, export_lerobot

IMAGE, WRIST = "observation.images.image", "observation.images.image2"
EVERY_FRAME_VALID = {"phase_names": ("approach", "descend", "close")}


@pytest.fixture
def demonstrations(make_demonstration, tmp_path):
    """Three episodes of 4, 5 and 6 steps under `tmp_path / "demos"`, the last of another task."""
    made = []
    for seed, instruction in enumerate(("push the plate", "push the plate", "open the drawer")):
        demonstration = make_demonstration(4 + seed, seed, 32, instruction=instruction, **EVERY_FRAME_VALID)
        path = tmp_path / "demos" / "suite" / instruction.replace(" ", "_") / f"seed_{seed:08d}.hdf5"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_demonstration(path, demonstration, images=("raw", "webp")[seed == 2])
        made.append(demonstration)
    return [made[2], made[0], made[1]]  # in the order of their paths


@pytest.fixture
def exported(demonstrations, tmp_path):
    assert export_lerobot(tmp_path / "demos", tmp_path / "out") == Exported(episodes=3, frames=15, skipped=0)
    return tmp_path / "out"


def test_frames_are_the_labels_and_states_of_every_episode_in_order(exported, demonstrations):
    rows = parquet.read_table(exported / "data/chunk-000/file-000.parquet").to_pydict()
    np.testing.assert_array_equal(rows["index"], np.arange(15))
    np.testing.assert_array_equal(rows["episode_index"], [0] * 6 + [1] * 4 + [2] * 5)
    np.testing.assert_array_equal(rows["task_index"], [0] * 6 + [1] * 9)
    np.testing.assert_array_equal(rows["frame_index"], [*range(6), *range(4), *range(5)])
    np.testing.assert_allclose(rows["timestamp"], np.array(rows["frame_index"]) / 20, atol=1e-7)
    actions = np.concatenate([demo.actions for demo in demonstrations]).astype(np.float32)
    np.testing.assert_array_equal(np.array(rows["action"], np.float32), actions)
    first = demonstrations[0].proprio
    state = np.concatenate([first["eef_pos"], axis_angle(first["eef_quat"]), first["gripper_qpos"]], 1)
    np.testing.assert_array_equal(np.array(rows["observation.state"][:6], np.float32), state.astype(np.float32))


def test_videos_are_the_mirrored_views_at_the_timestamps_that_the_episodes_name(exported, demonstrations):
    episodes = parquet.read_table(exported / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    for key, camera in ((IMAGE, "agentview"), (WRIST, "robot0_eye_in_hand")):
        with av.open(str(exported / f"videos/{key}/chunk-000/file-000.mp4")) as video:
            frames = {round(frame.time, 4): frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)}
        assert len(frames) == 15
        for row, demo in zip(episodes, demonstrations, strict=True):
            assert row[f"videos/{key}/to_timestamp"] - row[f"videos/{key}/from_timestamp"] == pytest.approx(
                row["length"] / 20
            )
            for step in range(row["length"]):
                shown = frames[round(row[f"videos/{key}/from_timestamp"] + step / 20, 4)].astype(int)
                assert np.abs(shown - demo.images[camera][step][:, ::-1]).mean() < 12


def test_episodes_name_their_rows_task_and_statistics(exported, demonstrations):
    episodes = parquet.read_table(exported / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in episodes] == [(0, 6), (6, 10), (10, 15)]
    assert [row["tasks"] for row in episodes] == [["open the drawer"], ["push the plate"], ["push the plate"]]
    for row, demo in zip(episodes, demonstrations, strict=True):
        np.testing.assert_allclose(row["stats/action/mean"], demo.actions.mean(0), atol=1e-6)
        np.testing.assert_allclose(row["stats/action/max"], demo.actions.max(0), atol=1e-6)


def test_statistics_of_everything_are_exact_for_vectors_and_from_0_to_1_for_images(exported, demonstrations):
    stats = json.loads((exported / "meta/stats.json").read_text())
    actions = np.concatenate([demo.actions for demo in demonstrations])
    for name, expected in (
        ("mean", actions.mean(0)),
        ("std", actions.std(0)),
        ("min", actions.min(0)),
        ("q01", np.quantile(actions, 0.01, axis=0)),
        ("q99", np.quantile(actions, 0.99, axis=0)),
    ):
        np.testing.assert_allclose(stats["action"][name], expected, atol=1e-6)
    assert stats["action"]["count"] == [15]
    pixels = np.concatenate([demo.images["agentview"].reshape(-1, 3) for demo in demonstrations]) / 255
    mean = np.array(stats[IMAGE]["mean"])
    assert mean.shape == (3, 1, 1)
    np.testing.assert_allclose(mean.ravel(), pixels.mean(0), atol=0.08)


def test_info_describes_what_is_there(exported):
    info = json.loads((exported / "meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["robot_type"]) == ("v3.0", 20, "panda")
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 15, 2)
    assert info["splits"] == {"train": "0:3"}
    assert {key: value["shape"] for key, value in info["features"].items() if len(value["shape"]) > 1} == {
        IMAGE: [32, 32, 3],
        WRIST: [32, 32, 3],
    }
    columns = parquet.read_schema(exported / info["data_path"].format(chunk_index=0, file_index=0)).names
    assert set(info["features"]) == {*columns, IMAGE, WRIST}


def test_episodes_go_to_a_new_file_when_one_is_full(demonstrations, tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot, "FILE_FRAMES", 8)
    export_lerobot(tmp_path / "demos", tmp_path / "out")
    rows = parquet.read_table(tmp_path / "out/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["data/file_index"] for row in rows] == [0, 0, 1]
    assert [row[f"videos/{IMAGE}/from_timestamp"] for row in rows] == [0.0, 0.3, 0.0]
    assert parquet.read_table(tmp_path / "out/data/chunk-000/file-001.parquet")["index"].to_pylist() == [*range(10, 15)]
    with av.open(str(tmp_path / f"out/videos/{WRIST}/chunk-000/file-001.mp4")) as video:
        assert len(list(video.decode(video=0))) == 5


def test_an_episode_ends_before_the_expert_is_lost_and_one_that_starts_so_is_left_out(make_demonstration, tmp_path):
    names = ("approach", "lost")
    late = make_demonstration(5, 1, phases=np.array([0, 0, 0, 1, 0], np.int8), phase_names=names)
    early = make_demonstration(5, 2, phases=np.array([1, 0, 0, 0, 0], np.int8), phase_names=names)
    for demonstration in (late, early):
        write_demonstration(tmp_path / f"seed_{demonstration.seed:08d}.hdf5", demonstration)
    assert export_lerobot(tmp_path, tmp_path / "out") == Exported(episodes=1, frames=3, skipped=1)


def test_what_cannot_be_exported_is_named_and_leaves_nothing(make_demonstration, demonstrations, tmp_path):
    with pytest.raises(PolicyError, match="no demonstration under"):
        export_lerobot(tmp_path / "nowhere", tmp_path / "out")
    last = tmp_path / "demos" / "z" / "seed_00000009.hdf5"
    last.parent.mkdir()
    write_demonstration(last, make_demonstration(size=16))
    with pytest.raises(PolicyError, match=r"seed_00000009\.hdf5.*16.*32"):
        export_lerobot(tmp_path / "demos", tmp_path / "out")
    last.write_bytes(b"")
    with pytest.raises(PolicyError, match=r"seed_00000009\.hdf5"):
        export_lerobot(tmp_path / "demos", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["demos"]
    (tmp_path / "out").mkdir()
    with pytest.raises(PolicyError, match="exists"):
        export_lerobot(tmp_path / "demos", tmp_path / "out")


@pytest.mark.skipif(find_spec("lerobot") is None, reason="the lerobot package is not installed; it is no dependency")
def test_lerobot_opens_it(exported):
    code = """
import sys
from lerobot.datasets.lerobot_dataset import LeRobotDataset
dataset = LeRobotDataset("local/test", root=sys.argv[1], delta_timestamps={"action": [0.0, 0.05]})
item = dataset[9]
print(len(dataset), dataset.meta.total_episodes, item["task"], tuple(item["action"].shape), item["action_is_pad"][1])
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(exported)], capture_output=True, text=True, check=True, timeout=200
    )
    assert result.stdout.split() == ["15", "3", "push", "the", "plate", "(2,", "7)", "tensor(True)"]
