"""How an evaluation stands, on a terminal as a live table, elsewhere as a line an episode."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from sim.ledger import Progress
from sim.statistics import percent, wilson


def counts(outcomes: list[str]) -> dict[str, int]:
    """How often each outcome."""
    return {outcome: outcomes.count(outcome) for outcome in ("success", "failure", "error")}


def rows(progress: Progress) -> list[dict[str, Any]]:
    """One row for each suite and task that is planned, and one for all; errors are counted apart."""
    tasks = dict.fromkeys((key.suite, key.task) for key in progress.planned)
    by_task: dict[tuple[str, int], list[str]] = {task: [] for task in tasks}
    planned = dict.fromkeys(tasks, 0)
    for key in progress.planned:
        planned[key.suite, key.task] += 1
        if key in progress.outcomes:
            by_task[key.suite, key.task].append(progress.outcomes[key])
    made = [
        {"suite": suite, "task": task, **_row(outcomes, planned[suite, task])}
        for (suite, task), outcomes in by_task.items()
    ]
    return [*made, {"suite": "all", "task": None, **_row(list(progress.outcomes.values()), len(progress.planned))}]


def _row(outcomes: list[str], planned: int) -> dict[str, Any]:
    count = counts(outcomes)
    n = count["success"] + count["failure"]
    low, high = wilson(count["success"], n)
    return {
        "planned": planned,
        "n": n,
        "successes": count["success"],
        "errors": count["error"],
        "rate": count["success"] / n if n else None,
        "interval": [low, high],
    }


def _table(progress: Progress, title: str) -> Table:
    table = Table("suite", "task", title=title, caption=_pace(progress))
    for name in ("n", "success", "rate", "95 % interval", "errors"):
        table.add_column(name, justify="right")
    all_rows = rows(progress)
    for row in all_rows:
        if row is all_rows[-1]:
            table.add_section()
        table.add_row(
            row["suite"],
            "" if row["task"] is None else str(row["task"]),
            f"{row['n'] + row['errors']}/{row['planned']}",
            str(row["successes"]),
            percent(row["rate"]),
            "{:.0%} - {:.0%}".format(*row["interval"]) if row["n"] else "",
            str(row["errors"] or ""),
        )
    return table


def _pace(progress: Progress) -> str:
    left = progress.seconds_left()
    played = progress.done - progress.before
    if math.isnan(left):
        return f"{progress.done} of {len(progress.planned)} episodes are there"
    pace = (len(progress.planned) - progress.done) / left * 3600 if left else 0.0
    text = f"{played} episodes played now"
    return f"{text}, {pace:.0f} an hour, {duration(left)} left" if left else text


def duration(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


@contextlib.contextmanager
def shown(console: Console, title: str) -> Iterator[Callable[[Progress], None]]:
    """What to call with the progress after every episode."""
    if not console.is_terminal:
        yield lambda progress: _line(console, progress)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield lambda progress: live.update(_table(progress, title), refresh=True)


def _line(console: Console, progress: Progress) -> None:
    if progress.done == progress.before:
        console.print(_pace(progress))
        return
    key, outcome = list(progress.outcomes.items())[-1]
    total = rows(progress)[-1]
    console.print(
        f"{progress.done}/{len(progress.planned)} {key}: {outcome}; {total['successes']}/{total['n']} "
        f"{percent(total['rate'])}, {duration(progress.seconds_left())} left",
        soft_wrap=True,
        highlight=False,
    )


def show_table(console: Console, progress: Progress, title: str) -> None:
    """Prints the table as it stands."""
    console.print(_table(progress, title))
