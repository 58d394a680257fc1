"""Prints what pushes did under each rule of reuse."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from sim.push import Pushed
from sim.statistics import mcnemar, percent, wilson


def show_pushes(played: Iterable[Sequence[Pushed]], json_output: bool) -> None:
    """played: for each state, the same episode under every rule; none where there was no reuse to disturb.

    Tells of each state on stderr as it is played, and prints a table, or JSON, on stdout.
    """
    pairs, skipped = [], 0
    for episodes in played:
        if not episodes:
            skipped += 1
            continue
        pairs.append(episodes)
        first = episodes[0]
        said = "; ".join(f"{e.rule} {'solved' if e.success else 'failed'}, delay {e.delay}" for e in episodes)
        sys.stderr.write(f"{first.suite} task {first.task} state {first.init_state} step {first.step}: {said}\n")
    rows = [summary(side, pairs) for side in range(len(pairs[0]))] if pairs else []
    if json_output:
        found = {"rules": rows, "undisturbed": skipped, "episodes": [asdict(e) for pair in pairs for e in pair]}
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    table = Table(
        "rule", "solved", "95 % interval", "p against the first", "delay: mean, most", "reused", title="pushed"
    )
    for row in rows:
        low, high = row["interval"]
        table.add_row(
            row["rule"],
            f"{row['solved']} of {row['n']}",
            f"{percent(low)} - {percent(high)}",
            f"{row['p']:.3g}",
            f"{row['mean_delay']:.2f}, {row['most_delay']}",
            percent(row["reused"]),
        )
    console = Console()
    console.print(table)
    console.print(f"{skipped} episodes had no reuse near the object and were left out", highlight=False)


def summary(side: int, pairs: Sequence[Sequence[Pushed]]) -> dict[str, Any]:
    """One rule over all pairs, against the first rule by McNemar's exact test; delays are in steps."""
    mine, first = [pair[side] for pair in pairs], [pair[0] for pair in pairs]
    delays = [episode.delay for episode in mine if episode.delay is not None]
    lost = sum(theirs.success and not own.success for own, theirs in zip(mine, first, strict=True))
    won = sum(own.success and not theirs.success for own, theirs in zip(mine, first, strict=True))
    solved = sum(episode.success for episode in mine)
    return {
        "rule": mine[0].rule,
        "n": len(mine),
        "solved": solved,
        "interval": wilson(solved, len(mine)),
        "p": mcnemar(lost, won) if lost + won else 1.0,
        "mean_delay": sum(delays) / len(delays) if delays else float("nan"),
        "most_delay": max(delays, default=None),
        "reused": sum(episode.reused for episode in mine) / len(mine),
    }
