"""What a linear layer costs in every number format: time, error and memory, in one run.

Every contender runs once, then every one again, so that a slow moment of the machine falls on all. The order is drawn
anew each time: what ran before leaves caches behind. So weights come from as far away as they do within a large model.
Then each runs some times in a row, with what caches can hold of its weights near by, as within a small model.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant import native
from quant.contenders import BASELINE, Contender, others, ours
from quant.errors import QuantError
from quant.formats import FloatFormat
from quant.packed import Activation, PackedLinear
from quant.timing import best_seconds, read_rate

IN_A_ROW = 0.3  # s of calls of one contender, at least
ENOUGH = 1.5  # s; what has taken so long in all is not called again
CPU = torch.device("cpu")
LIMITS = {"shapes": 1 << 16, "batches": 1 << 16, "threads": 1024, "repeats": 100_000}


@dataclass(frozen=True)
class BenchConfig:
    """shapes: outputs and inputs of layers, such as "768x192".  batches: rows of inputs.  threads: of every contender;
    the first number is what others are compared with.  repeats: calls measured of each, fewer of slow ones.

    Raises QuantError: none of them, no number of that form, or one beyond its limit.
    """

    shapes: tuple[str, ...] = ("4096x4096", "768x192", "192x768")
    batches: tuple[int, ...] = (1, 64, 150)
    threads: tuple[int, ...] = (1,)
    repeats: int = 20

    def __post_init__(self) -> None:
        for text in self.shapes:
            parts = text.split("x")
            if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
                raise QuantError(f"BenchConfig.shapes holds {text!r}: write outputs x inputs, such as 768x192")
        for name, limit in LIMITS.items():
            given = getattr(self, name)
            values = (given,) if name == "repeats" else given
            if name == "shapes":
                values = [value for size in self.sizes for value in size]
            if not values:
                raise QuantError(f"BenchConfig.{name} is empty: give one or more")
            for value in values:
                if not 1 <= value <= limit:
                    raise QuantError(f"BenchConfig.{name} holds {value}: it must be from 1 to {limit}")

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of every shape."""
        return [(int(count), int(size)) for count, size in (text.split("x") for text in self.shapes)]


@torch.inference_mode()
def measure(config: BenchConfig | None = None) -> dict[str, Any]:
    """Layers of normal random weights on normal random inputs.

    Returns what JSON can hold. "rows": for every shape, number of threads, batch and contender
        "calls" measured; "min_ms" and "median_ms" of one; "times_as_fast" as plain float32, by the shortest calls;
        "in_a_row_ms" and "in_a_row_times", the shortest of calls that last 0.3 s in a row, and how often as fast;
        "error": root mean square of the difference to plain float32's output, over that of the output;
        "bytes" of the weights, and "share" of what they take in float16;
        "floor_ms": the larger of the bytes of weights, inputs and outputs at the memory's rate, and of two operations a
        weight and row at the best rate measured of its arithmetic; "bound" says which, "memory" or "arithmetic".
        Weights that stay in a processor's cache may be faster than the memory's floor;
        "kernel": of ours, the instructions, or "reference"; and "scaling", over the first number of threads.
    "absent": shape, contender and reason.  "machine": its rates for every number of threads.
    """
    config = config or BenchConfig()
    before = torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    absent: list[dict[str, str]] = []
    speeds: dict[int, dict[str, float]] = {}
    try:
        for threads in config.threads:
            torch.set_num_threads(threads)
            speeds[threads] = machine_speeds()
        for shape, (count, size) in zip(config.shapes, config.sizes, strict=True):
            layer, sample = _layer(count, size), _normal(256, size, seed=1)
            packed = ours(layer, sample)
            for threads in config.threads:
                torch.set_num_threads(threads)
                found, reasons = others(layer, sample, threads)
                new = [{"shape": shape, "name": name, "reason": why} for name, why in reasons.items()]
                absent += [one for one in new if one not in absent]
                for batch in config.batches:
                    place = {"shape": shape, "threads": threads, "batch": batch}
                    x = _normal(batch, size, seed=2)
                    rows += [{**place, **row} for row in compare(found + packed, x, config.repeats, speeds[threads])]
    finally:
        torch.set_num_threads(before)
    _add_scaling(rows, config.threads[0])
    return {
        "rows": rows,
        "absent": absent,
        "machine": [
            {"threads": threads, **{name: round(rate / 1e9, 1) for name, rate in rates.items()}}
            for threads, rates in speeds.items()
        ],
        "instructions": native.available()[-1] if native.available() else "none",
        "torch": torch.__version__,
    }


def compare(found: list[Contender], x: Tensor, repeats: int, speeds: dict[str, float]) -> list[dict[str, Any]]:
    """One row for each contender on the same inputs; see `measure`.  x: (batch, K).  speeds: see `machine_speeds`."""
    outputs = {one.name: one.run(x).float() for one in found}
    exact = outputs[BASELINE]
    seconds: dict[str, list[float]] = {one.name: [] for one in found}
    draw = random.Random(0)
    for _ in range(repeats):
        for one in draw.sample(found, len(found)):
            taken = seconds[one.name]
            if sum(taken) < ENOUGH:
                started = time.perf_counter()
                one.run(x)
                taken.append(time.perf_counter() - started)
    in_a_row = {}
    for one in found:  # long enough for the threads of the one before to fall asleep
        calls = max(len(seconds[one.name]), math.ceil(IN_A_ROW / min(seconds[one.name])))
        in_a_row[one.name] = best_seconds(partial(one.run, x), CPU, calls)
    rows = []
    for one in found:
        taken = seconds[one.name]
        memory = (one.size + x.nbytes + exact.nbytes) / speeds["read"]
        arithmetic = 2 * x.shape[1] * exact.numel() / speeds[one.arithmetic]
        rows.append(
            {
                "name": one.name,
                "calls": len(taken),
                "min_ms": 1e3 * min(taken),
                "median_ms": 1e3 * statistics.median(taken),
                "times_as_fast": min(seconds[BASELINE]) / min(taken),
                "in_a_row_ms": 1e3 * in_a_row[one.name],
                "in_a_row_times": in_a_row[BASELINE] / in_a_row[one.name],
                "error": float((outputs[one.name] - exact).norm() / exact.norm()),
                "bytes": one.size,
                "share": one.size / (2 * x.shape[1] * exact.shape[1]),
                "floor_ms": 1e3 * max(memory, arithmetic),
                "bound": "memory" if memory > arithmetic else "arithmetic",
                "kernel": _kernel(one),
            }
        )
    return rows


def machine_speeds() -> dict[str, float]:
    """Bytes a second of "read", and operations a second of "float32", "bfloat16" and "int8": the best of what is here
    on a product of 64 x 1024 by 1024, which is "int8" with our own kernels. torch's number of threads counts.
    """
    x, weight = torch.ones(64, 1024), torch.ones(1024, 1024)
    half = weight.bfloat16()
    grid = FloatFormat.parse("E1M6")  # the integers of a byte
    codes, scale = torch.ones(1024, 1024, dtype=torch.uint8), torch.ones(1024)
    packed = PackedLinear(codes, (grid,), torch.zeros(1024), scale, None, Activation(grid, 1.0))

    def rate(call: Callable[[], Tensor]) -> float:
        return 2 * x.numel() * len(weight) / best_seconds(call, CPU)

    plain = rate(lambda: F.linear(x, weight))
    if torch.backends.mkldnn.is_available():
        plain = max(plain, rate(lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")))
    # What is slower in fewer bits can be done in more.
    fewer = {"bfloat16": rate(lambda: F.linear(x.bfloat16(), half)), "int8": rate(lambda: packed(x))}
    rates = {name: max(plain, each) for name, each in fewer.items()}
    return {"read": read_rate(torch.float32, CPU), "float32": plain, **rates}


def _kernel(contender: Contender) -> str:
    layer = contender.run
    if not isinstance(layer, PackedLinear):
        return ""
    return native.INSTRUCTIONS[native.chosen()] if layer.native(CPU) else "reference"


def _add_scaling(rows: list[dict[str, Any]], first: int) -> None:
    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["shape"], row["batch"], row["name"]

    base = {place(row): row["min_ms"] for row in rows if row["threads"] == first}
    for row in rows:
        row["scaling"] = base[place(row)] / row["min_ms"]


def _normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _layer(count: int, size: int) -> nn.Linear:
    layer = nn.Linear(size, count, bias=False)
    layer.weight.copy_(_normal(count, size, seed=0) / size**0.5)
    return layer.eval()
