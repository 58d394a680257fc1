"""How long calls take, and what a machine reaches at its best."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor


def best_seconds(call: Callable[[], Tensor], device: torch.device, repeats: int = 12) -> float:
    """The shortest of so many calls, each with its work on the device done."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        wait(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def read_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Bytes a second: the best of reading more memory than caches hold.

    On a CPU in pieces, one after the other, short enough that now and then no other program interrupts; and each from
    its start to its end, and at eight places at once, which keeps more of the memory busy.
    """
    scale, pieces = (8, 1) if device.type == "cuda" else (1, 16)
    large = torch.ones((scale * 256 << 20) // dtype.itemsize, dtype=dtype, device=device).view(pieces, 8, -1)
    turn = cycle(large)
    ways = (lambda: next(turn).max(), lambda: next(turn).amax(0))
    return large[0].nbytes / min(best_seconds(way, device, 6 * pieces) for way in ways)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
