"""How an evaluation is shown while it runs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from flashvla_ros.eval_table import duration, rows, show_table, shown
from sim.ledger import Progress
from sim.results import EpisodeKey

KEYS = [EpisodeKey("libero_goal", task, state, 0) for task in (0, 1) for state in range(3)]


@pytest.fixture
def progress() -> Progress:
    outcomes = dict(zip(KEYS, ["success", "failure", "error", "success"], strict=False))
    return Progress(KEYS, outcomes, before=1, started=-1e6)


def test_a_row_a_task_and_one_for_all_with_errors_apart(progress: Progress) -> None:
    first, second, total = rows(progress)
    assert (first["n"], first["successes"], first["errors"], first["planned"]) == (2, 1, 1, 3)
    assert second["rate"] == 1.0
    assert second["interval"] == pytest.approx([0.2065, 1.0], abs=1e-4)
    assert (total["suite"], total["n"], total["successes"], total["errors"]) == ("all", 3, 2, 1)


def test_without_a_terminal_every_episode_is_a_line(progress: Progress) -> None:
    console = Console(file=io.StringIO(), width=200)
    with shown(console, "title") as show:
        show(Progress(KEYS, {KEYS[0]: "success"}, before=1))
        show(progress)
    first, second = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert first == "1 of 6 episodes are there"
    assert second.startswith("4/6 libero_goal task 1 state 0 seed 0: success; 2/3 66.7 %, ")


def test_on_a_terminal_the_table_lives_and_nothing_of_it_stays(progress: Progress) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with shown(console, "title") as show:
        show(progress)
        assert "66.7 %" in console.file.getvalue()  # type: ignore[attr-defined]
    assert console.file.getvalue().rstrip("\n").endswith("\x1b[2K")  # type: ignore[attr-defined]


def test_the_table_says_how_many_of_how_many(progress: Progress) -> None:
    console = Console(file=io.StringIO(), width=120)
    show_table(console, progress, "hold: run.sqlite")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "hold: run.sqlite" in text
    assert "3/3" in text
    assert "3 episodes played now" in text


def test_time_is_hours_minutes_seconds() -> None:
    assert (duration(3725.4), duration(59.6)) == ("1:02:05", "0:01:00")
