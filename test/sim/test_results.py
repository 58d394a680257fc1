"""A run's file: whole after a crash, one writer, nothing doubled."""

from __future__ import annotations

import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sim.errors import ConfigurationError, ResultError
from sim.merging import merge
from sim.results import EpisodeKey, EpisodeResult, RunFile, summarise_flags, summarise_seconds

CONFIGURATION = {"policy": {"name": "hold"}, "env": {"renderer": "fast", "cameras": ("agentview",)}}


def result(task: int = 0, state: int | str = 0, outcome: str = "success", **changes: object) -> EpisodeResult:
    made = EpisodeResult(
        key=EpisodeKey("libero_goal", task, state, 0),
        language="turn on the stove",
        outcome=outcome,
        steps=3,
        started="2024-01-01T00:00:00+00:00",
        finished="2024-01-01T00:00:01+00:00",
        actions=np.arange(21, dtype=np.float32).reshape(3, 7) / 21,
        timing={"policy": np.array([0.25, 0.5, 0.75]), "vision": np.array([0.25, np.nan, np.nan])},
        flags={"reused": {"mean": 0.5, "n": 2}},
        provenance={"mujoco": "3.3.2"},
        error="Traceback" if outcome == "error" else None,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def make_run(path: Path, *results: EpisodeResult, configuration: dict = CONFIGURATION) -> Path:
    with RunFile(path, write=True) as run:
        for variant in {episode.key.variant for episode in results}:
            run.configure(variant, configuration)
        for episode in results:
            run.add(episode)
    return path


def test_an_episode_comes_back_as_it_was_stored(tmp_path: Path) -> None:
    stored = result(state="sampled", video=b"mp4")
    make_run(tmp_path / "run", stored)
    with RunFile(tmp_path / "run") as run:
        (back,) = run.episodes(videos=True)
    np.testing.assert_array_equal(back.actions, stored.actions)
    for stage, seconds in stored.timing.items():
        np.testing.assert_array_equal(back.timing[stage], seconds)
    arrays = {"actions": stored.actions, "timing": stored.timing}
    assert dataclasses.replace(back, **arrays) == stored
    assert back.latency["vision"] == {"mean": 0.25, "p50": 0.25, "p99": 0.25, "n": 1}


def test_a_finished_episode_is_never_replaced_and_an_error_is(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", result(outcome="error"), result(task=1, outcome="failure"))
    with RunFile(path, write=True) as run:
        run.add(result(outcome="success"))
        with pytest.raises(ResultError, match="task 1 state 0 seed 0 already"):
            run.add(result(task=1, outcome="success"))
        assert sorted(run.outcomes().values()) == ["failure", "success"]


def test_a_changed_configuration_is_an_error_that_says_what_differs(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", result())
    changed = {"policy": {"name": "hold"}, "env": {"renderer": "official", "cameras": ["agentview"]}}
    with RunFile(path, write=True) as run:
        run.configure("", CONFIGURATION)
        with pytest.raises(ConfigurationError, match=r"configuration: env.renderer was 'fast', is 'official'\."):
            run.configure("", changed)
        run.configure("other variant", changed)


def test_an_episode_of_an_unknown_variant_cannot_be_stored(tmp_path: Path) -> None:
    with RunFile(tmp_path / "run", write=True) as run, pytest.raises(ResultError, match="FOREIGN KEY"):
        run.add(result())


def test_only_one_process_writes_and_others_may_read_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunFile(path, write=True) as run:
        run.configure("", CONFIGURATION)
        run.add(result())
        with pytest.raises(ConfigurationError, match="another process is writing"):
            RunFile(path, write=True)
        with RunFile(path) as reader:
            assert len(reader.outcomes()) == 1
    assert [item.name for item in tmp_path.iterdir()] == ["run"]  # one file, with nothing beside it


def test_a_writer_killed_at_once_loses_nothing_it_stored_and_leaves_the_file_free(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from test_results import CONFIGURATION, RunFile, result\n"
        "run = RunFile(Path(sys.argv[1]), write=True)\n"
        "run.configure('', CONFIGURATION)\n"
        "for task in range(5): run.add(result(task))\n"
        "run._connection.execute('BEGIN')\n"
        "run._connection.execute('DELETE FROM episodes')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    with RunFile(tmp_path / "run", write=True) as run:
        assert [episode.key.task for episode in run.episodes()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("content", [b"not a database, but long enough to be taken for one" * 40, b""])
def test_a_file_that_is_no_run_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="run"):
        RunFile(path)
    assert path.read_bytes() == content


def test_a_finished_run_is_one_file_that_reading_leaves_alone(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", result())
    before = path.read_bytes()
    with RunFile(path) as run:
        assert len(list(run.episodes())) == 1
    assert [item.name for item in tmp_path.iterdir()] == ["run"]
    assert path.read_bytes() == before


def test_another_database_is_refused_for_writing(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE mine (x)")
    other.close()
    before = (tmp_path / "other").read_bytes()
    with pytest.raises(ConfigurationError, match="not a run"):
        RunFile(tmp_path / "other", write=True)
    assert (tmp_path / "other").read_bytes() == before


def test_a_missing_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere"):
        RunFile(tmp_path / "nowhere")


def test_a_full_disk_is_an_error_that_keeps_what_was_stored(tmp_path: Path) -> None:
    with RunFile(tmp_path / "run", write=True) as run:
        run.configure("", CONFIGURATION)
        run.add(result())
        run._connection.execute("PRAGMA max_page_count = 8")
        with pytest.raises(ResultError, match=r"full.*What was stored before is kept"):
            run.add(result(task=1, video=bytes(1_000_000)))
        assert len(run.outcomes()) == 1


def test_merging_twice_changes_nothing_and_an_error_gives_way(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", result(0, outcome="error"), result(1))
    b = make_run(tmp_path / "b", result(0, outcome="failure"), result(2, video=b"mp4"))
    assert merge(tmp_path / "out", [a, b]) == (4, 0)
    assert merge(tmp_path / "out", [b, a]) == (0, 4)
    with RunFile(tmp_path / "out") as run:
        merged = list(run.episodes(videos=True))
    assert [(episode.key.task, episode.outcome) for episode in merged] == [
        (0, "failure"),
        (1, "success"),
        (2, "success"),
    ]
    assert merged[2].video == b"mp4"


def test_runs_that_contradict_each_other_are_not_merged(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", result()), make_run(tmp_path / "b", result(outcome="failure"))
    with pytest.raises(ConfigurationError, match=r"ended in failure after 3 steps in .*b, and in success"):
        merge(tmp_path / "out", [a, b])


def test_runs_of_different_configurations_are_not_merged(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", result())
    b = make_run(tmp_path / "b", result(1), configuration={"policy": {"name": "mini"}})
    with pytest.raises(ConfigurationError, match=r"policy\.name was 'hold', is 'mini'"):
        merge(tmp_path / "out", [a, b])


def test_flags_are_means_of_numbers_and_counts_of_texts() -> None:
    steps = [{"reused": True, "reason": "same"}, {"reused": False, "reason": "new"}, {"reused": False}]
    assert summarise_flags(steps) == {
        "reused": {"mean": pytest.approx(1 / 3), "n": 3},
        "reason": {"counts": {"new": 1, "same": 1}},
    }


def test_a_stage_that_no_step_had_has_no_summary() -> None:
    assert summarise_seconds(np.array([np.nan, np.nan])) == {}
