"""Prints what choosing visual tokens costs and saves, as `mllm.bench_compress` measures it."""

from __future__ import annotations

import json
import sys

from rich.table import Table

from flashvla_ros.console import table_console
from mllm.bench_compress import BenchCompressConfig, measure_compression


def run_bench(config: BenchCompressConfig, json_output: bool) -> int:
    """Measures and prints a table, or JSON on stdout. Returns 0."""
    console = table_console(json_output)
    with console.status(f"{config.model}: every arm by turns"):
        result = measure_compression(config)
    table = Table(
        "arm",
        "step p50",
        "p99",
        "CPU",
        "of all",
        "select p50",
        "of a step",
        "visual",
        "FLOPs",
        "eigen",
        title=f"{config.model}, {result['visual_tokens']} visual tokens, n = {config.steps}, milliseconds and shares",
    )
    for name, arm in result["arms"].items():
        table.add_row(
            name,
            *(f"{arm['step'][key]:.2f}" for key in ("p50_ms", "p99_ms")),
            f"{arm['cpu']['p50_ms']:.2f}",
            f"{arm['cpu_share']:.0%}",
            f"{arm['select']['p50_ms']:.2f}" if "select" in arm else "",
            f"{arm['select_share']:.1%}",
            *(f"{arm[key]:.1%}" for key in ("visual_flops", "step_flops", "eigen_flops")),
        )
    console.print(table)
    console.print(
        "CPU: processor time, p50, which other programs disturb least; of all: of the uncompressed; visual: operations "
        "of the decoder on visual tokens; FLOPs: of the whole step; eigen: what eigenvectors add to these, about"
    )
    score, exact, machine = result["score"], result["exact"], result["machine"]
    console.print(
        f"highest scores, {', '.join(map(str, exact['keeps']))} kept: equal to those of a float64 decomposition in "
        f"{exact['equal']} of {exact['observations']} observations, {exact['tokens']} tokens differ in all"
    )
    console.print(
        f"the score of 256 x 4096 on one thread: {score['ours_ms']} ms of processor time, as published "
        f"{score['published_ms']} ms, {score['times_as_fast']} times\n{machine['device']}, {machine['threads']} threads"
    )
    if json_output:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0
