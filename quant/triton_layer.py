"""`PackedLinear` on an NVIDIA GPU: which of the kernels compute it, and with which sums."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from quant.tiles import INPUTS

# Rows from which tensor cores compute.
MANY = 5
# Sums of whole numbers that tensor cores hold exactly: with operands of 16 bits those that float32 does. With 8 bits
# Ada's and Hopper's keep 13 bits of a sum behind the first (SageAttention2, arXiv 2411.10958; DeepSeek-V3, arXiv
# 2412.19437, section 3.5.2), which makes 2^14; one bit is left in reserve.
EXACT = {torch.float16: 1 << 24, torch.float8_e4m3fn: 1 << 13}
# Inputs that an instruction adds at least, and bytes of a row of weights that a step reads at most.
LEAST, MOST = {torch.float16: 16, torch.float8_e4m3fn: 32}, 64


@cache
def available(device: torch.device) -> bool:
    """Whether there is Triton, and the GPU is one that it compiles for: NVIDIA's from compute capability 8.0 on."""
    if device.type != "cuda" or torch.version.cuda is None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def operands(mantissa: int, limit: int, largest: int, eights: bool) -> tuple[torch.dtype, int] | None:
    """As which numbers tensor cores multiply integers of inputs and weights, and how many they add; None: none exactly.

    Every partial sum of a run of products is a whole number of at most run * limit * largest: all are exact if that is.
    limit, largest: of an input's and a weight's integer, either way.  mantissa: bits of the format of inputs.
    eights: whether there are FP8 tensor cores like Ada's and Hopper's.  Returns the type, and the run: a power of two.
    """
    product = max(1, limit * largest)
    for dtype, bits in ((torch.float8_e4m3fn, 3), (torch.float16, 10)):
        if dtype.itemsize == 1 and not eights:
            continue
        run = min(MOST, 1 << (EXACT[dtype] // product).bit_length() - 1) if product <= EXACT[dtype] else 0
        if mantissa <= bits and limit <= torch.finfo(dtype).max and run >= LEAST[dtype]:
            return dtype, run
    return None


def packed_linear(
    x: Tensor,
    tiles: Tensor,
    table: Tensor,
    choice: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    sums: Tensor,
    channels: int,
    largest: int,
    step: float,
    zero: float,
    mantissa: int,
    limit: int,
    signed: bool,
    eights: bool | None = None,
) -> Tensor:
    """See `quant.ops`. Weights are codes of 4 bits.  eights: see `operands`; None: as the GPU is."""
    from quant import triton_kernels as kernels

    inputs, groups = x.shape[-1], -(-x.shape[-1] // INPUTS)
    y = torch.empty((*x.shape[:-1], channels), dtype=x.dtype, device=x.device)
    rows = y.numel() // channels if channels else 0
    if not rows:
        return y
    given = (x.float() if x.dtype is torch.float64 else x).reshape(rows, inputs).contiguous()
    weights = (tiles, table, choice, scale, bias, sums)
    grid = (step, zero, mantissa, float(-limit if signed else 0), float(limit)) if step else (1.0, 0.0, 0, 0.0, 0.0)
    if eights is None:
        # What those of Blackwell and later keep of a sum we do not know.
        eights = (8, 9) <= torch.cuda.get_device_capability(x.device) <= (9, 0)
    kind = operands(mantissa, limit, largest, eights) if step else (given.dtype, MOST)
    with torch.cuda.device_of(x):
        if rows < MANY or kind is None:
            kernels.multiply_row[(rows, len(tiles))](
                given,
                *weights,
                y,
                inputs,
                channels,
                groups,
                *grid,
                QUANTISED=bool(step),
                GROUPS=8,
                enable_fp_fusion=not step,
            )
            return y
        dtype, run = kind
        steps, width = None, inputs
        if step:
            width, steps = groups * INPUTS, torch.empty(rows, dtype=torch.float32, device=x.device)
            whole = torch.empty((rows, width), dtype=dtype, device=x.device)
            kernels.quantise_rows[(rows,)](given, whole, steps, inputs, width, *grid, enable_fp_fusion=False)
            given = whole
        size = tile_size(rows, dtype, run)
        kernels.multiply_tile[(-(-rows // size["ROWS"]), -(-channels // size["CHANNELS"]))](
            given,
            steps,
            *weights,
            y,
            rows,
            width,
            channels,
            groups,
            grid[1],
            WHOLE=bool(step) and inputs * limit * largest > EXACT[torch.float16],
            enable_fp_fusion=False,
            **size,
        )
    return y


def tile_size(rows: int, dtype: torch.dtype, run: int) -> dict[str, int]:
    """What a program computes at a time, as `multiply_tile` takes it: what fits into registers and shared memory."""
    if dtype is torch.float32:  # in three parts each
        return {"ROWS": 16 if rows <= 16 else 32, "CHANNELS": 64, "RUN": 32, "num_warps": 4}
    tall = min(128, max(16, 1 << (rows - 1).bit_length()))
    large = tall >= 64
    return {"ROWS": tall, "CHANNELS": 128 if large else 64, "RUN": run, "num_warps": 8 if large else 4}
