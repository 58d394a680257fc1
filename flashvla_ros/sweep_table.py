"""Prints what the arms of a sweep do."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from flashvla_ros.comparison import as_json
from flashvla_ros.console import table_console
from flashvla_ros.eval_table import shown
from mllm.sweep import Arm, Clip
from sim.evaluate import EvalConfig, Execution
from sim.results import EpisodeKey, EpisodeResult, RunFile
from sim.standings import REFERENCE, Standing, standings
from sim.statistics import percent
from sim.sweep import closed_loop


def show_open_loop(
    rows: Iterable[dict[str, Any]], clips: Sequence[Clip], facts: Mapping[str, Any], json_output: bool
) -> None:
    """rows: of `sim.sweep.open_loop`; each is told on stderr as it comes."""
    console, found = table_console(json_output), []
    frames = sum(len(clip.proprio["eef_pos"]) for clip in clips)
    for row in rows:
        found.append(row)
        sys.stderr.write(f"{row['arm']}: error {row['error']['mean']:.5f}\n")
    table = Table(
        Column("arm", overflow="fold"), title=f"{len(clips)} clips, {frames} observations; against {found[0]['arm']}"
    )
    for name in ("pose, 1e-3", "95 % interval", "gripper", "tokens", "overlap", "chance", "reused", "FLOPs", "visual"):
        table.add_column(name, justify="right")
    for row in found:
        low, high = row["error"]["interval"]
        table.add_row(
            row["arm"],
            f"{1e3 * row['error']['mean']:.2f}",
            f"{1e3 * low:.2f} - {1e3 * high:.2f}",
            percent(row["gripper"]["mean"]),
            percent(row["agreement"]["mean"]) if row["agreement"] else "",
            "" if row["overlap"] is None else f"{row['overlap']:.3f}",
            "" if row["chance"] is None else f"{row['chance']:.3f}",
            percent(row["reused"]),
            percent(row["flops_share"]),
            percent(row["visual_flops_share"]),
        )
    console.print(table)
    if json_output:
        drawn = [{"file": clip.path.name, "start": clip.start, "instruction": clip.instruction} for clip in clips]
        sys.stdout.write(json.dumps({**facts, "observations": frames, "clips": drawn, "arms": found}, indent=2) + "\n")


def run_closed_loop(
    path: Path,
    config: EvalConfig,
    arms: Sequence[Arm],
    keys: Sequence[EpisodeKey],
    execution: Execution,
    json_output: bool,
) -> int:
    """Plays what the run at `path` lacks, and prints all its arms. Returns 1 where an episode is an error."""
    console = table_console(json_output)
    title = f"{config.policy}, {len(arms)} arms: {path}"
    with warnings.catch_warnings(), shown(console, title) as show:
        warnings.showwarning = lambda message, *_: console.print(f"warning: {message}", style="yellow", markup=False)
        progress = closed_loop(path, config, arms, keys, execution, show)
    wanted: dict[str, list[EpisodeResult]] = {arm.name: [] for arm in arms}
    with RunFile(path) as run:
        for name, episodes in wanted.items():
            episodes += [episode for episode in run.episodes(name) if episode.key in progress.outcomes]
    found = standings(wanted)
    console.print(standings_table(found, title))
    if json_output:
        sys.stdout.write(json.dumps({"run": str(path), "arms": [_plain(one) for one in found]}, indent=2) + "\n")
    return 1 if "error" in progress.outcomes.values() else 0


def standings_table(found: Sequence[Standing], title: str) -> Table:
    """One row a variant; differences are from the first. Milliseconds are the policy's, over all control steps; MB
    the model's weights.
    """
    table = Table(Column("arm", overflow="fold"), title=title)
    names = [
        "n",
        "success",
        "95 % interval",
        "points",
        "p",
        "mean ms",
        "p99 ms",
        "reused",
        "GFLOPs",
        "visual",
        "MB",
        "errors",
    ]
    for name in names:
        table.add_column(name, justify="right")
    for one in found:
        against = one.against
        table.add_row(
            one.variant,
            str(one.n),
            percent(one.rate),
            "{:.0%} - {:.0%}".format(*one.interval) if one.n else "",
            f"{100 * against.success.value:+.1f}" if against else "",
            f"{against.p_value:.3g}" if against else "",
            *(f"{1e3 * one.latency[name]:.2f}" if one.latency else "" for name in ("mean", "p99")),
            percent(one.reused),
            "" if one.flops is None else f"{one.flops / 1e9:.3g}",
            "" if one.visual_flops is None else f"{one.visual_flops / 1e9:.3g}",
            "" if one.weight_bytes is None else f"{one.weight_bytes / 1e6:.3g}",
            str(one.errors or ""),
        )
    return table


def _plain(one: Standing) -> dict[str, Any]:
    against = None if one.against is None else as_json(one.against, (REFERENCE, one.variant))
    return {**asdict(replace(one, against=None)), "against": against}
