"""Prints what a linear layer costs in every number format, as `quant.bench` measures it."""

from __future__ import annotations

import json
import sys

from rich.table import Table

from flashvla_ros.console import table_console
from quant.bench import BenchConfig, measure


def run_bench(config: BenchConfig, json_output: bool) -> int:
    """Measures and prints a table for every layer, batch and number of threads, or JSON on stdout. Returns 0."""
    console = table_console(json_output)
    with console.status("every contender by turns"):
        result = measure(config)
    columns = (
        "",
        "n",
        "min ms",
        "median ms",
        "times as fast",
        "in a row ms",
        "times as fast",
        "error",
        "kB",
        "of fp16",
        "floor ms",
        "bound",
        "scaling",
    )
    tables: dict[str, Table] = {}
    for row in result["rows"]:
        title = f"{row['shape']}, batch {row['batch']}, threads {row['threads']}"
        tables.setdefault(title, Table(*columns, title=title)).add_row(
            f"{row['name']} ({row['kernel']})" if row["kernel"] else row["name"],
            str(row["calls"]),
            f"{row['min_ms']:.3f}",
            f"{row['median_ms']:.3f}",
            f"{row['times_as_fast']:.2f}",
            f"{row['in_a_row_ms']:.3f}",
            f"{row['in_a_row_times']:.2f}",
            f"{row['error']:.4f}",
            f"{row['bytes'] / 1e3:.1f}",
            f"{row['share']:.3f}",
            f"{row['floor_ms']:.3f}",
            row["bound"],
            f"{row['scaling']:.2f}",
        )
    for table in tables.values():
        console.print(table)
    console.print(
        "times as fast: as float32, by the shortest calls, at first with the others' between; error: root mean square, "
        "of float32's output; floor: what the memory or the arithmetic takes at least; scaling: over threads "
        f"{config.threads[0]}"
    )
    for absent in result["absent"]:
        console.print(f"absent: {absent['name']}, {absent['shape']}: {absent['reason']}", markup=False)
    for speeds in result["machine"]:
        console.print(
            f"machine, threads {speeds['threads']}: reads {speeds['read']} GB/s; G operations/s: {speeds['float32']} "
            f"in float32, {speeds['bfloat16']} in bfloat16, {speeds['int8']} in int8"
        )
    if json_output:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0
