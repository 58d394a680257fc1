"""Prints what an action of the model costs beside transformers with the same weights, as `mllm.bench` measures it."""

from __future__ import annotations

import json
import sys

from rich.console import Console
from rich.table import Table

from mllm.bench import BenchConfig, measure


def run_bench(config: BenchConfig, json_output: bool) -> int:
    """Measures and prints a table, or JSON on stdout. Returns 0, but 1 when in float32 the two chose other tokens."""
    console = Console(stderr=json_output)
    with console.status(f"{config.model}: ours and the baseline by turns"):
        result = measure(config)
    machine, achieved = result["machine"], result["achieved"]
    table = Table(
        "stage",
        "ours p50 ms",
        "p99 ms",
        "baseline p50 ms",
        "p99 ms",
        "floor ms",
        title=f"{config.model}, {result['parameters'] / 1e6:.1f} M parameters, n = {config.steps}",
    )
    for stage, ours in result["ours"].items():
        baseline = result["baseline"].get(stage, {})
        table.add_row(
            stage,
            *(f"{row[key]:.2f}" if row else "" for row in (ours, baseline) for key in ("p50_ms", "p99_ms")),
            str(result["floor_ms"].get(stage, "")),
        )
    console.print(table)
    console.print(
        f"{result['speedup']} times as fast; same tokens in {result['equal_actions']:.0%} of the actions\n"
        f"achieved: {achieved['gflop_per_s']} GFLOP/s in vision and prefill, {achieved['gb_per_s']} GB/s in "
        f"decode, of {result['passes']} passes\n"
        f"machine: {machine['gflop_per_s']} GFLOP/s, {machine['gb_per_s']} GB/s; {machine['device']}, "
        f"{machine['dtype']}, {machine['threads']} threads"
    )
    if json_output:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0 if result["equal_tokens"] or config.dtype != "float32" else 1
