"""Kernels of packed layers of 4 bits for GPUs, in Triton; `quant/triton_layer.py` chooses among them and starts them.

Weights are read as `quant/tiles.py` lays them and become numbers in registers. The bits of an ExMy code, moved to the
exponent and the mantissa of a format with no fewer bits in either, are that number there, subnormals too, divided by a
power of two: two shifts make float16 or e4m3 of a code, and the power of two is made good behind the sum (our choice).

Arguments of several kernels, shapes as in `quant.packed.PackedLinear`:
    x (rows, columns) contiguous; y (rows, channels); groups: of 32 inputs, the last one padded; the rest as held there.
    step, zero, mantissa, low, high: of the grid of inputs.
Floating-point operations are float32, in the order of `PackedLinear.reference`, and must not be contracted.
"""

import triton
import triton.language as tl

from quant import tiles as layout

BLOCK: tl.constexpr = tl.constexpr(layout.CHANNELS)
LANE: tl.constexpr = tl.constexpr(layout.LANE)
GROUP: tl.constexpr = tl.constexpr(layout.INPUTS)
TILE: tl.constexpr = tl.constexpr(layout.CHANNELS * layout.LANE)  # bytes of 16 channels by 32 inputs
MAGIC: tl.constexpr = tl.constexpr(1.5 * 2**23)  # adding it rounds to a whole number, ties to even
WIDTH: tl.constexpr = tl.constexpr(1024)  # inputs that are quantised at a time


@triton.jit
def integers(x, step, zero, mantissa, low, high):
    """`Activation.integers` of x, float32, and where x is NaN."""
    ratio = tl.div_rn(x - zero, step)
    broken = ratio != ratio
    ratio = tl.where(ratio > low, ratio, low)  # NaN too
    ratio = tl.where(ratio < high, ratio, high)
    power = ratio.to(tl.int32, bitcast=True) & 0x7F800000
    unit = tl.maximum(power, (127 + mantissa) << 23) - (mantissa << 23)
    inverse = 0x7F000000 - unit
    count = (ratio * inverse.to(tl.float32, bitcast=True) + MAGIC) - MAGIC
    return count * unit.to(tl.float32, bitcast=True), broken


@triton.jit
def channels_of(slot):
    """Tiles hold a block's channels in the order 0, 4, 8, 12, 1, 5, ...: those at the given places."""
    return slot // BLOCK * BLOCK + slot % 4 * 4 + slot % BLOCK // 4


@triton.jit
def mantissas(table, choice, channel, held):
    """Mantissa bits of channels' formats, which their largest integers tell: 7 is E1M2's, 12 E2M1's, 64 E3M0's."""
    row = tl.load(choice + channel, mask=held, other=0).to(tl.int32)
    largest = tl.load(table + row * 16 + 7).to(tl.int32)
    return tl.where(largest == 7, 2, tl.where(largest == 12, 1, 0))


@triton.jit
def whole_weights(codes, mantissa):
    """The codes' integers, int32."""
    size = codes & 7
    shift = tl.maximum((size >> mantissa) - 1, 0)
    size = (size - (shift << mantissa)) << shift
    return tl.where(codes < 8, size, -size)


@triton.jit
def scaled_weights(codes, mantissa, dtype: tl.constexpr):
    """The codes' integers, each divided by its channel's `units`, exactly."""
    if dtype == tl.float8e4nv:
        bits = (codes & 7) << (3 - mantissa) | (codes & 8) << 4
        numbers = bits.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        bits = (codes & 7) << (10 - mantissa) | (codes & 8) << 12
        numbers = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(dtype)
    return numbers


@triton.jit
def units(mantissa, dtype: tl.constexpr):
    """Two to the bias less one and the mantissa bits: what a code is smaller by in e4m3 or float16."""
    power = mantissa + (6 if dtype == tl.float8e4nv else 14)
    return ((127 + power) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scales_and_offsets(scale, bias, sums, zero, channel, held):
    """What channels' sums are multiplied by, but for the step of inputs, and what is added then."""
    scale = tl.load(scale + channel, mask=held, other=0.0)
    offset = scale * zero * tl.load(sums + channel, mask=held, other=0).to(tl.float32)
    if bias is not None:
        offset += tl.load(bias + channel, mask=held, other=0.0)
    return scale, offset


@triton.jit
def quantise_rows(x, whole, steps, columns, width, step, zero, mantissa, low, high):
    """Writes whole (rows, width), float16 or e4m3: the integers of x; and steps (rows): NaN for a row that has a NaN.

    Grid: (rows,).
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    broken = tl.zeros((WIDTH,), tl.int32)
    for first in range(0, width, WIDTH):
        column = first + place
        values = tl.load(x + row * columns + column, mask=column < columns, other=0.0).to(tl.float32)
        numbers, wrong = integers(values, step, zero, mantissa, low, high)
        tl.store(whole + row * width + column, numbers.to(whole.dtype.element_ty), mask=column < width)
        broken |= wrong.to(tl.int32)
    tl.store(steps + row, tl.where(tl.max(broken, 0) > 0, float("nan"), step))


@triton.jit
def multiply_row(
    x, tiles, table, choice, scale, bias, sums, y, columns, channels, groups,
    step, zero, mantissa, low, high, QUANTISED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A few rows, each by itself, without tensor cores: int32 sums of integers, float32 sums of inputs without a grid.

    Tiles are read as they lie, every byte once a row. Grid: (rows, blocks of 16 channels).
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, lane = tl.arange(0, BLOCK), tl.arange(0, LANE)
    channel = channels_of(block * BLOCK + slot)
    held = channel < channels
    mantissa_w = mantissas(table, choice, channel, held)[None, :, None]
    x += row * columns
    tiles += block.to(tl.int64) * groups * TILE
    total = tl.zeros((GROUPS, BLOCK, LANE), tl.int32 if QUANTISED else tl.float32)
    broken = tl.zeros((GROUPS, LANE), tl.int32)
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        place = group[:, None, None] * TILE + slot[None, :, None] * LANE + lane[None, None, :]
        codes = tl.load(tiles + place, mask=(group < groups)[:, None, None], other=0).to(tl.int32)
        for half in tl.static_range(2):
            column = group[:, None] * GROUP + half * LANE + lane[None, :]
            inputs = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
            weights = codes >> 4 * half & 15
            if QUANTISED:
                inputs, wrong = integers(inputs, step, zero, mantissa, low, high)
                broken |= wrong.to(tl.int32)
                total += inputs.to(tl.int32)[:, None, :] * whole_weights(weights, mantissa_w)
            else:
                total += inputs[:, None, :] * scaled_weights(weights, mantissa_w, tl.float32)
    total = tl.sum(tl.sum(total, 2), 0).to(tl.float32)
    if QUANTISED:
        step = tl.where(tl.max(tl.max(broken, 1), 0) > 0, float("nan"), step)
    else:
        total *= units(tl.reshape(mantissa_w, (BLOCK,)), tl.float32)
    scale, offset = scales_and_offsets(scale, bias, sums, zero, channel, held)
    tl.store(y + row * channels + channel, (total * (scale * step) + offset).to(y.dtype.element_ty), mask=held)


@triton.jit
def multiply_tile(
    x, steps, tiles, table, choice, scale, bias, sums, y, rows, columns, channels, groups, zero,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, RUN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Many rows, on tensor cores. x: float16 or e4m3, integers with their steps; or any type without, steps None.

    RUN inputs are added there at a time, and those sums in float32, or WHOLE in int32: `quant.triton_layer.operands`
    says which are exact. Grid: (blocks of ROWS rows, blocks of CHANNELS channels).
    """
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel = channels_of(slot)
    used, held = row < rows, channel < channels
    mantissa_w = mantissas(table, choice, channel, held)[:, None]
    unit = units(mantissa_w, dtype)
    x += row.to(tl.int64)[:, None] * columns
    tiles += (slot // BLOCK).to(tl.int64)[:, None] * groups * TILE + (slot % BLOCK)[:, None] * LANE
    # A lane is 16 bytes: inputs 0 to 15 of a group in their low halves, 16 to 31 in their high ones.
    place = tl.arange(0, RUN)
    group, lane = place // LANE, place % LANE
    total = tl.zeros((CHANNELS, ROWS), tl.int32 if WHOLE else tl.float32)
    for first in range(0, groups, RUN // LANE):
        here = first + group
        known = held[:, None] & (here < groups)[None, :]
        codes = tl.load(tiles + (here * TILE + lane)[None, :], mask=known, other=0).to(tl.int32)
        for half in tl.static_range(2):
            column = here * GROUP + half * LANE + lane
            inputs = tl.load(x + column[None, :], mask=used[:, None] & (column < columns)[None, :], other=0.0)
            weights = scaled_weights(codes >> 4 * half & 15, mantissa_w, dtype)
            if WHOLE:
                total += (tl.dot(weights, tl.trans(inputs)) * unit).to(tl.int32)
            elif dtype == tl.float8e4nv:
                # With this limit the compiler does not let sums grow within the tensor cores.
                total += tl.dot(weights, tl.trans(inputs), max_num_imprecise_acc=RUN)
            else:
                total += tl.dot(weights, tl.trans(inputs), input_precision="tf32x3")
    value = total.to(tl.float32)
    if not WHOLE:
        value *= unit
    scale, offset = scales_and_offsets(scale, bias, sums, zero, channel, held)
    scale = scale[:, None]
    if steps is not None:
        scale *= tl.load(steps + row, mask=used, other=0.0)[None, :]
    value = value * scale + offset[:, None]
    y += row.to(tl.int64)[None, :] * channels + channel[:, None]
    tl.store(y, value.to(y.dtype.element_ty), mask=used[None, :] & held[:, None])
