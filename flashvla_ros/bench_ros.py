"""What ROS 2 adds to a control step, beside the floor: a plain pipe between two processes with the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from flashvla_ros.monitor import percentiles
from flashvla_ros.session import interruptible, ros_context, run_episode

# Poses, joint states, clock, camera infos and the answering command are small beside two images.
SMALL_BYTES = 2048
LIMITS_MS = {"p50": 8.0, "p99": 20.0}


def _echo(pipe: Connection, count: int) -> None:
    for _ in range(count):
        pipe.recv_bytes()
        pipe.send_bytes(bytes(SMALL_BYTES))


def pipe_round_trips(image_bytes: int, count: int) -> np.ndarray:
    """Milliseconds of `count` round trips: the images to another process, a small answer back. (count,)"""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_echo, args=(theirs, count), daemon=True)
    process.start()
    theirs.close()
    payload, times = bytes(image_bytes), []
    for _ in range(count):
        start = time.perf_counter()
        ours.send_bytes(payload)
        ours.recv_bytes()
        times.append(time.perf_counter() - start)
    process.join()
    return np.array(times[1:]) * 1e3  # the first one waits for the process to start


def run_bench(*, steps: int, image_size: int, json_output: bool) -> int:
    """Runs `steps` lockstep steps of the `libero` graph with the `hold` policy. Returns 0 when they all happened."""
    console = Console(stderr=json_output)
    bridge = {"step_limit": steps, "image_size": image_size}
    with interruptible(), ros_context(), console.status(f"{steps} lockstep steps"):
        session = run_episode({"sim_bridge": bridge}, limit=60 + 5 * steps)
    outcome = session.outcome()
    table = session.monitor.table()
    measured = len(table["step"])
    if outcome.outcome == "error" or not measured:
        console.print(outcome.facts.get("error", "no step was measured"), style="red", markup=False)
        return 1
    image_bytes = 2 * 3 * image_size**2
    added = table["transport"] + table["gate"]
    result: dict[str, Any] = {
        "n": measured,
        "image_bytes": image_bytes,
        "limits_ms": LIMITS_MS,
        "ros_ms": percentiles(added),
        "pipe_ms": percentiles(pipe_round_trips(image_bytes, measured + 1)),
        "stages_ms": {name: percentiles(values) for name, values in table.items()},
        "versions": {k: v for k, v in outcome.facts.items() if k not in ("error", "instruction")},
    }
    rows = Table(
        "per step", "p50 ms", "p99 ms", "max ms", title=f"n = {measured}, two {image_size}x{image_size} cameras"
    )
    for label, key in (("ROS 2: transport + gate", "ros_ms"), ("floor: pipe, same bytes", "pipe_ms")):
        rows.add_row(label, *(f"{result[key][k]:.2f}" for k in ("p50", "p99", "max")))
    console.print(rows)
    if json_output:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0 if measured == steps else 1
