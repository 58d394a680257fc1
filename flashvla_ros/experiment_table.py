"""Runs an experiment, and shows what came of it: a table, a picture, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from flashvla_ros.console import table_console
from flashvla_ros.palette import BLUE, INK, ORANGE, picture_style
from mllm.diffusion.experiment import ExperimentConfig, Outcome, Task, outcomes, run_experiment


def show(folder: Path, tasks: Sequence[Task], config: ExperimentConfig, json_output: bool) -> int:
    """Runs what is missing. Writes `summary.json` and a picture of each task; prints tables, or JSON. Returns 0."""
    console = table_console(json_output)
    rows = run_experiment(folder, tasks, config, lambda line: sys.stderr.write(f"{line}\n"))
    found = {task.name: _outcomes(rows, task.name) for task in tasks}
    for name, metrics in found.items():
        draw(metrics, rows, name, folder / f"{name.replace(' ', '-')}.png")
        for metric, arms in metrics.items():
            console.print(table(arms, f"{name}: {metric}, {arms[0].n} seeds; less is better"))
    console.print(f"rows, table and pictures: {folder}")
    summary = {
        name: {metric: [asdict(arm) for arm in arms] for metric, arms in of.items()} for name, of in found.items()
    }
    text = json.dumps({"settings": asdict(config), "outcomes": summary}, indent=2) + "\n"
    (folder / "summary.json").write_text(text, encoding="utf-8")
    if json_output:
        sys.stdout.write(text)
    return 0


def _outcomes(rows: Sequence[Mapping[str, Any]], task: str) -> dict[str, list[Outcome]]:
    metrics = next(row["metrics"] for row in rows if row["task"] == task)
    return {metric: outcomes(rows, task, metric) for metric in metrics}


def table(arms: Sequence[Outcome], title: str) -> Table:
    """One row an arm, with what it has more than the arm that it must beat."""
    made = Table("arm", title=title)
    for name in ("mean", "spread", "difference", "spread", "better in", "kB"):
        made.add_column(name, justify="right")
    made.add_column("than")
    for arm in arms:
        made.add_row(
            arm.arm,
            f"{arm.mean:.4g}",
            "" if arm.spread is None else f"{arm.spread:.2g}",
            "" if arm.difference is None else f"{arm.difference:+.3g}",
            "" if arm.deviation is None else f"{arm.deviation:.2g}",
            "" if arm.better is None else f"{arm.better} of {arm.n}",
            f"{arm.bytes / 1000:.0f}",
            arm.against or "",
        )
    return made


def draw(metrics: Mapping[str, Sequence[Outcome]], rows: Sequence[Mapping[str, Any]], task: str, path: Path) -> None:
    """One panel a metric, one line an arm: every seed a dot, and their mean a bar."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(picture_style(9)):
        names = [arm.arm for arm in next(iter(metrics.values()))]
        figure = Figure((3.2 * len(metrics) + 2.2, 0.32 * len(names) + 1.0), layout="constrained", dpi=150)
        panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for panel, (metric, arms) in zip(panels, metrics.items(), strict=True):
            for place, arm in enumerate(arms):
                colour = ORANGE if "LoRA" in arm.arm else BLUE
                panel.barh(place, arm.mean, color=colour, alpha=0.35, height=0.7)
                seeds = [row["metrics"][metric] for row in rows if (row["task"], row["arm"]) == (task, arm.arm)]
                panel.plot(seeds, [place] * len(seeds), "o", color=colour, markersize=3.5)
            panel.set_title(metric, color=INK, fontsize=9)
            panel.grid(axis="x")
            panel.locator_params(axis="x", nbins=5)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].invert_yaxis()
        figure.savefig(path)
