"""The GPU's kernels by Triton's interpreter, which has to be asked for before Triton is imported.

`test_triton.py` runs this file in a process of its own. Where the interpreter differs from a GPU it is replaced by what
is known of one. Tensor cores multiply exactly, align the addends to the largest of them, and cut what lies so many bits
below (of 16 bits: Fasi, Higham, Mikaitis and Pranesh, PeerJ Computer Science 7:e330; of 8 bits on Ada and Hopper:
SageAttention2, arXiv 2411.10958). Conversions round to the nearest, bfloat16 too.
"""

from __future__ import annotations

import math
import os

import ml_dtypes
import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from quant import triton_layer
from quant.formats import FloatFormat
from quant.packed import OWN_GRID, Activation, PackedLinear

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"

TYPES = {
    tl.float8e4nv: np.dtype(ml_dtypes.float8_e4m3fn),
    tl.bfloat16: np.dtype(ml_dtypes.bfloat16),
    tl.float16: np.dtype(np.float16),
    tl.float32: np.dtype(np.float32),
}
# Bits of a sum behind its first, and products that are added at a time.
CORES = {tl.float8e4nv: (13, 32), tl.float16: (23, 16), tl.bfloat16: (23, 16)}

FOUR = ("E1M2", "E2M1", "E3M0")
INPUTS = (*FOUR, "uE1M3", "uE2M2", "uE3M1", "uE4M0")
MORE = ("E1M1", "E1M4", "E2M3", "E3M2", "E4M1", "uE2M4", "uE3M3", "uE4M2", "E2M5", "uE3M5")


def convert(data, old, new, rounding):
    return data.view(TYPES[old]).astype(TYPES[new]).view(f"u{TYPES[new].itemsize}")


def tensor_cores(a, b, bits, together):
    """The product of float64 matrices as tensor cores add it up."""
    total = np.zeros((len(a), b.shape[1]))
    for k in range(0, a.shape[1], together):
        addends = np.concatenate((a[:, k : k + together, None] * b[None, k : k + together], total[:, None]), 1)
        unit = np.exp2(np.frexp(np.abs(addends).max(1))[1] - 1.0 - bits)
        total = np.trunc(addends / unit[:, None]).sum(1) * unit
        unit = np.exp2(np.frexp(np.abs(total))[1] - 1.0 - bits)
        total = np.trunc(total / unit) * unit
    return total


def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    one, other = (each.data.view(TYPES[each.dtype.scalar]).astype(np.float64) for each in (a, b))
    kind = a.dtype.scalar
    total = tensor_cores(one, other, *CORES[kind]) if kind in CORES else one @ other
    return interpreter.TensorHandle(total.astype(np.float32) + d.data, d.dtype.scalar)


interpreter._convert_float = convert
interpreter.InterpreterBuilder.create_dot = dot


def layer(shape, weights, inputs, seed=0, bias=True):
    """Channels of every format, with codes at random."""
    formats = tuple(map(FloatFormat.parse, weights))
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(0, len(formats), shape[:1], generator=generator)
    codes = torch.randint(0, 16, shape, generator=generator).to(torch.uint8)
    scale = torch.rand(shape[0], generator=generator) * 0.02 + 1e-3
    offset = torch.randn(shape[0], generator=generator) if bias else None
    format = inputs and FloatFormat.parse(inputs)
    return PackedLinear(
        codes, formats, choice, scale, offset, format and Activation(format, 0.37, 0.0 if format.signed else -0.83)
    )


def compute(packed, x, eights=True):
    held = packed._buffers
    grid = packed.activation.grid if packed.activation else OWN_GRID
    weights = (held[name] for name in ("tiles", "table", "choice", "scale", "bias", "sums"))
    return triton_layer.packed_linear(x, *weights, packed.out_features, packed.largest, *grid, eights=eights)


def bits(y):
    """Bits of a result; NaN has many, of which this makes one."""
    return y.float().nan_to_num(nan=7.5e-39, posinf=math.inf, neginf=-math.inf).view(torch.int32)


def observations(shape, packed, seed=0):
    """Numbers of every size on the grid and beyond, halfway between its numbers, infinite and not a number."""
    generator = torch.Generator().manual_seed(seed)
    largest = packed.activation.format.largest if packed.activation else 8
    size = torch.exp2(torch.rand(shape, generator=generator) * (math.log2(largest) + 3) - 2)
    x = size * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)
    x = torch.where(torch.rand(shape, generator=generator) < 0.4, (x * 2).round() / 2, x) * 0.37
    rare = torch.randint(0, 100, shape, generator=generator)
    for case, value in enumerate((0.0, -0.0, 1e-42, 3e38, math.inf, -math.inf)):
        x[rare == case] = value
    x[(torch.rand(shape[:-1], generator=generator) < 0.1).nonzero(as_tuple=True)] = math.nan
    return x


def test_these_tensor_cores_lose_what_lies_below_their_bits():
    column = np.ones((64, 1))
    row = np.full((1, 64), 2.0**8)
    row[0, 1] = 1
    assert tensor_cores(row, column, 13, 32) == 63 * 2**8 + 1
    row[row > 1] = 2**10
    assert tensor_cores(row, column, 13, 32) == 63 * 2**10
    assert tensor_cores(row, column, 23, 16) == 63 * 2**10 + 1


@pytest.mark.parametrize("eights", [True, False])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weights", FOUR)
def test_every_pair_of_formats_gives_the_references_bits_on_tensor_cores(weights, inputs, eights):
    """All weights and inputs are the largest at first, then smaller ones: the worst that sums can meet."""
    format, grid = FloatFormat.parse(weights), FloatFormat.parse(inputs)
    codes = torch.randint(0, 16, (16, 97), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    codes[:8, :70] = 7
    codes[1] |= 8
    packed = PackedLinear(
        codes, (format,), torch.zeros(16), torch.ones(16), None, Activation(grid, 1.0, 0.0 if grid.signed else -2.0)
    )
    x = observations((triton_layer.MANY, 97), packed)
    x[:2, :70] = 1e9
    assert torch.equal(bits(compute(packed, x, eights)), bits(packed.reference(x)))


@given(
    st.tuples(st.integers(1, 40), st.integers(0, 150)),
    st.integers(0, 3) | st.integers(triton_layer.MANY, 20),
    st.lists(st.sampled_from(FOUR), min_size=1, max_size=3, unique=True),
    st.sampled_from(INPUTS + MORE),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32),
)
@settings(max_examples=12, deadline=None)
def test_the_bits_are_those_of_the_reference(shape, rows, weights, inputs, bias, eights, seed):
    packed = layer(shape, weights, inputs, seed, bias)
    x = observations((rows, shape[1]), packed, seed)
    assert torch.equal(bits(compute(packed, x, eights)), bits(packed.reference(x)))


def test_sums_beyond_what_float32_holds_are_exact():
    """As float32 the sums of the last runs would be even."""
    grid, generator = FloatFormat.parse("uE3M1"), torch.Generator().manual_seed(0)
    codes = torch.where(torch.rand((16, 2400), generator=generator) < 0.05, 1, 7).to(torch.uint8)
    packed = PackedLinear(
        codes, (FloatFormat.parse("E3M0"),), torch.zeros(16), torch.ones(16), None, Activation(grid, 1.0)
    )
    x = torch.where(torch.rand((triton_layer.MANY, 2400), generator=generator) < 0.05, 1.0, 192.0)
    expected = packed.reference(x)
    assert float(expected.min()) > 2**24
    assert torch.equal(compute(packed, x), expected)


@given(
    st.tuples(st.integers(1, 40), st.integers(0, 150)),
    st.integers(1, 2) | st.integers(triton_layer.MANY, 20),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.integers(-8, 3),
    st.integers(0, 2**32),
)
@settings(max_examples=10, deadline=None)
def test_without_a_grid_for_inputs_only_rounding_differs(shape, rows, dtype, power, seed):
    packed = layer(shape, FOUR, None, seed)
    x = (torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(seed)) * 2.0**power).to(dtype)
    y = compute(packed, x)
    assert y.dtype is dtype
    weight, bias = packed.weight().double(), packed.bias[: shape[0]].double()
    exact = x.double() @ weight.T + bias
    # Each of so many additions in float32, those of tensor cores cut, then the result in its type.
    most = (x.double().abs() @ weight.abs().T + bias.abs()) * (shape[1] + 3) * 2.0**-22
    rounding = torch.finfo(torch.float32 if dtype is torch.float64 else dtype).eps
    assert bool(((y.double() - exact).abs() <= most + exact.abs() * rounding).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_of_every_type_and_stride_give_the_references_bits(dtype):
    packed = layer((21, 50), FOUR, "uE2M2")
    x = observations((6, 50), packed).to(dtype)
    for strided in (x.view(2, 3, 50), x.T.contiguous().T, x.repeat(1, 2)[::3, ::2], x[0].expand(5, 50), x[3]):
        y = compute(packed, strided)
        assert y.dtype is dtype
        assert torch.equal(bits(y), bits(packed.reference(strided)))


@pytest.mark.parametrize(("shape", "rows"), [((0, 20), 6), ((20, 33), 0), ((20, 0), 2), ((20, 0), 6)])
@pytest.mark.parametrize("inputs", ["E2M1", None])
def test_there_may_be_no_rows_no_channels_or_no_inputs(shape, rows, inputs):
    packed = layer(shape, FOUR, inputs)
    x = torch.zeros(rows, shape[1])
    assert torch.equal(compute(packed, x), packed.reference(x))
