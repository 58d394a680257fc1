"""Prints a paired comparison of two evaluations."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from sim.results import EpisodeKey
from sim.statistics import Change, Comparison, percent, wilson


def show_comparison(comparison: Comparison, names: tuple[str, str], json_output: bool) -> None:
    """names: of A and B. Prints tables, or JSON on stdout."""
    if json_output:
        sys.stdout.write(json.dumps(as_json(comparison, names), indent=2) + "\n")
        return
    console = Console()
    table = Table("", "A", "B", "B - A (95 % interval)", title=f"A {names[0]}\nB {names[1]}")
    n = comparison.n
    table.add_row(f"success of {n}", *map(str, comparison.successes), "")
    table.add_row("rate", *(percent(count / n) for count in comparison.successes), _points(comparison.success))
    intervals = [wilson(count, n) for count in comparison.successes]
    table.add_row("95 % interval (Wilson)", *(f"{percent(low)} - {percent(high)}" for low, high in intervals), "")
    table.add_row("solved by it alone", str(len(comparison.only_a)), str(len(comparison.only_b)), "")
    table.add_section()
    for stage, measured in comparison.stages.items():
        change = _milliseconds(comparison) if stage == "policy" else ""
        table.add_row(f"{stage} ms: mean, p50, p99", *map(_latency, measured), change)
    operations = {"FLOPs": comparison.relative_flops, "visual FLOPs": comparison.relative_visual_flops}
    for name, share in operations.items():
        if share is not None:
            table.add_row(f"{name} a step", "", "", _share(share))
    console.print(table)
    console.print(f"McNemar's exact test: p = {comparison.p_value:.4g}, of {n} pairs", highlight=False)
    console.print(f"the same actions to the bit, and the same outcome: {comparison.identical} of {n}", highlight=False)
    for side, keys in (("A", comparison.only_a), ("B", comparison.only_b)):
        if keys:
            console.print(f"solved by {side} alone: {', '.join(map(str, keys))}", highlight=False)
    for key, sides in comparison.errors.items():
        console.print(f"left out, an error in {sides}: {key}", style="yellow", highlight=False)
    for note in comparison.notes:
        console.print(f"differs, and latency with it: {note}", style="yellow", highlight=False)


def as_json(comparison: Comparison, names: tuple[str, str]) -> dict[str, Any]:
    """The comparison in plain numbers, with intervals of both rates."""

    def key(episode: EpisodeKey) -> dict[str, Any]:
        return {name: value for name, value in asdict(episode).items() if name != "variant"}

    return asdict(replace(comparison, errors={})) | {
        "names": list(names),
        "intervals": [wilson(count, comparison.n) for count in comparison.successes],
        "only_a": [key(episode) for episode in comparison.only_a],
        "only_b": [key(episode) for episode in comparison.only_b],
        "errors": [{**key(episode), "in": sides} for episode, sides in comparison.errors.items()],
    }


def _latency(summary: Mapping[str, float]) -> str:
    return ", ".join(f"{summary[measure] * 1e3:.2f}" for measure in ("mean", "p50", "p99")) if summary else ""


def _points(change: Change) -> str:
    low, high = change.interval
    return f"{100 * change.value:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


def _milliseconds(comparison: Comparison) -> str:
    absolute, relative = comparison.latency, comparison.relative_latency
    if absolute is None or relative is None:
        return ""
    return f"{absolute.value * 1e3:+.2f} ms, {_share(relative)}"


def _share(change: Change) -> str:
    low, high = change.interval
    return f"{100 * change.value:+.1f} % ({100 * low:+.1f} to {100 * high:+.1f})"
