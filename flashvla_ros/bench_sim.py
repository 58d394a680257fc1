"""Prints what the simulator costs: official against fast, as `sim.bench` measures it."""

from __future__ import annotations

import json
import sys

from rich.console import Console
from rich.table import Table

from sim.bench import BenchConfig, measure


def run_bench(*, suite: str, task: int, image_size: int, json_output: bool) -> int:
    """Measures and prints a table, or JSON on stdout. Returns 0."""
    console = Console(stderr=json_output)
    with console.status("stepping and rendering, official and fast in turn"):
        result = measure(BenchConfig(suite=suite, task=task, image_size=image_size))
    table = Table(
        "CPU time", "official ms", "fast ms", "fast / official", title=f"{suite} task {task}, {image_size} px"
    )
    rows = {"control step": result["step"], **{f"image: {name}": row for name, row in result["render"].items()}}
    for name, row in rows.items():
        table.add_row(name, f"{row['official']['mean_ms']:.2f}", f"{row['fast']['mean_ms']:.2f}", f"{row['ratio']:.3f}")
    console.print(table)
    if json_output:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0
