"""The commands of evaluation as a user runs them; the whole command is really killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sim.results import RunFile

FLASHVLA = [sys.executable, "-m", "flashvla_ros.cli"]
# Blind and short, so that an episode takes no time once its scene is built.
SETTING = ["--policy", "hold", "--suite", "libero_object", "--cameras", "--step-limit", "4", "--settle-steps", "1"]


def run(*arguments: object, timeout: float = 250) -> subprocess.CompletedProcess[str]:
    command = [*FLASHVLA, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in the middle, gone on with, and finished."""
    path = tmp_path_factory.mktemp("runs") / "run.sqlite"
    command = [*FLASHVLA, "eval", str(path), *SETTING, "--tasks", "0", "--trials", "6", "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("2/6"):
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait(30) == -signal.SIGKILL
    with RunFile(path) as run_file:
        before = {episode.key: episode.finished for episode in run_file.episodes()}
    assert 2 <= len(before) < 6
    result = run("eval", path, *SETTING, "--tasks", "0", "--trials", "6", "--workers", "1", "--json")
    assert result.returncode == 0, result.stderr
    with RunFile(path) as run_file:
        after = {episode.key: episode.finished for episode in run_file.episodes()}
    assert before.items() <= after.items()
    total = json.loads(result.stdout)["rows"][-1]
    assert (total["n"], total["planned"], total["errors"]) == (6, 6, 0)
    return path


def test_a_killed_command_goes_on_where_it_was_with_nothing_lost_or_doubled(finished: Path) -> None:
    with RunFile(finished) as run_file:
        assert [episode.key.init_state for episode in run_file.episodes()] == list(range(6))
    assert [item.name for item in finished.parent.iterdir() if item.suffix != ".html"] == ["run.sqlite"]


def test_a_changed_setting_is_refused_by_name(finished: Path) -> None:
    result = run("eval", finished, *SETTING, "--tasks", "0", "--trials", "6", "--step-limit", "5")
    assert result.returncode == 2
    assert "env.step_limit was 4, is 5" in result.stderr


def test_a_run_merged_compares_as_equal_and_is_reported(finished: Path, tmp_path: Path) -> None:
    assert "6 episodes added" in run("merge", tmp_path / "b.sqlite", finished, finished).stdout
    result = run("compare", finished, tmp_path / "b.sqlite", "--json")
    assert result.returncode == 0, result.stderr
    compared = json.loads(result.stdout)
    assert (compared["n"], compared["identical"], compared["only_a"], compared["p_value"]) == (6, 6, [], 1.0)
    shown = run("compare", finished, tmp_path / "b.sqlite")
    assert "McNemar's exact test: p = 1" in shown.stdout
    result = run("report", tmp_path / "b.sqlite")
    assert result.stdout.strip() == str(tmp_path / "b.html")
    assert "hold on LIBERO" in (tmp_path / "b.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "--tasks", "10"], "no task 10"),
        (["eval", "--states", "x"], "--states"),
        (["eval", "--policy", "expert", "--through-ros"], "expert"),
        (["compare", "/nowhere/a", "/nowhere/b"], "/nowhere/a"),
        (["report", "/nowhere/a"], "/nowhere/a"),
        (["merge", "out.sqlite", "/nowhere/a"], "/nowhere/a"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_ends_with_status_2_and_says_what(arguments: list[str], said: str, tmp_path: Path) -> None:
    command = [*FLASHVLA, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert result.returncode == 2
    assert said in result.stderr + result.stdout
    assert "Traceback" not in result.stderr


def test_episodes_through_ros_equal_those_in_process(ros_environment: None, tmp_path: Path) -> None:
    from flashvla_ros.paths import demo_episode

    options = json.dumps({"episode": str(demo_episode()), "after_end": "hold"})
    setting = ["--policy", "replay", "--options", options, "--tasks", "0", "--states", "0-1"]
    setting += ["--image-size", "16", "--renderer", "fast", "--step-limit", "8"]
    played = run("eval", tmp_path / "ros.sqlite", *setting, "--through-ros")
    assert played.returncode == 0, played.stderr + played.stdout
    assert run("eval", tmp_path / "process.sqlite", *setting, "--workers", "1").returncode == 0
    compared = json.loads(run("compare", tmp_path / "ros.sqlite", tmp_path / "process.sqlite", "--json").stdout)
    assert (compared["n"], compared["identical"]) == (2, 2)
    with RunFile(tmp_path / "ros.sqlite") as run_file:
        episodes = list(run_file.episodes())
    for episode in episodes:
        assert {"policy", "gate", "transport", "physics", "render"} <= set(episode.latency)
        assert np.isfinite(episode.timing["policy"]).all()
        assert episode.provenance["executor"] == "ros"
