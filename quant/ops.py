"""What packed layers compute, as operators of torch: so graphs that torch traces or compiles contain them whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from quant import native, triton_layer
from quant.errors import QuantError
from quant.tiles import CHANNELS, INPUTS, LANE

# Multiplications that are worth a thread of their own: some 20 microseconds.
WORTH_A_THREAD = 1 << 20

_LIBRARY = torch.library.Library("flashvla", "DEF")
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor tiles, Tensor? table, Tensor choice, Tensor scale, Tensor? bias, Tensor sums, "
    "int channels, int largest, float step, float zero, int mantissa, int limit, bool signed) -> Tensor"
)


def packed_linear(x: Tensor, *layer: Any) -> Tensor:
    """`_compute`, as an operator where torch looks on; else directly: the way there takes as long as small layers."""
    watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or type(x) is not Tensor
    return _compute(x, *layer) if x.is_cpu and not watched else torch.ops.flashvla.packed_linear(x, *layer)


def _compute(
    x: Tensor,
    tiles: Tensor,
    table: Tensor | None,
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
) -> Tensor:
    """`PackedLinear` on the processor. The arguments are its buffers and its grid of inputs; a step of 0: one a row."""
    inputs = x.shape[-1]
    _check(inputs, channels, tiles, 1 if table is not None else INPUTS // LANE, choice, scale, sums)
    given = x.float().contiguous()
    y = torch.empty((*x.shape[:-1], channels), dtype=torch.float32)
    rows = y.numel() // channels if channels else 0
    threads = max(1, min(torch.get_num_threads(), rows * inputs * channels // WORTH_A_THREAD))
    native.run(
        native.Layer(
            tiles.data_ptr(),
            None if table is None else table.data_ptr(),
            choice.data_ptr(),
            scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            sums.data_ptr(),
            sums.dtype is torch.int32,
            channels,
            inputs,
            1 if table is not None else len(tiles),
            largest,
            step,
            zero,
            mantissa,
            limit,
            signed,
            given.data_ptr(),
            y.data_ptr(),
            rows,
        ),
        threads,
    )
    return y.to(x.dtype)


def _compute_on_gpu(x: Tensor, *layer: Any) -> Tensor:
    """The same on a GPU, for formats of 4 bits."""
    tiles, table, choice, scale, _, sums, channels = layer[:7]
    if table is None:
        raise QuantError("the GPU's kernels take codes of 4 bits: use PackedLinear, which computes other formats too")
    _check(x.shape[-1], channels, tiles, 1, choice, scale, sums)
    return triton_layer.packed_linear(x, *layer)


def _check(inputs: int, channels: int, tiles: Tensor, lanes: int, *each: Tensor) -> None:
    blocks = -(-channels // CHANNELS)
    shape = (blocks, -(-inputs // INPUTS) * lanes, 4, 4, LANE)
    if tiles.shape[-5:] != shape or any(len(one) != blocks * CHANNELS for one in each):
        raise QuantError(f"tiles of shape {tuple(tiles.shape)} are not of {channels} channels and {inputs} inputs")


def _shape(x: Tensor, tiles: Tensor, *rest: object) -> Tensor:
    channels = rest[5]
    assert isinstance(channels, int | torch.SymInt)
    return x.new_empty((*x.shape[:-1], channels))


_LIBRARY.impl("packed_linear", _compute, "CPU")
_LIBRARY.impl("packed_linear", _compute_on_gpu, "CUDA")
_LIBRARY.impl("packed_linear", _shape, "Meta")
