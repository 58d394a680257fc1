"""Number formats against independent implementations (ml_dtypes), the paper's formula and exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ml_dtypes = pytest.importorskip("ml_dtypes")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from quant.errors import QuantError  # noqa: E402
from quant.formats import FloatFormat, decode, encode, integers, pack, packed_size, quantise, unpack  # noqa: E402

some = settings(max_examples=60, deadline=None)
FORMATS = [
    FloatFormat(exponent, bits - signed - exponent, signed)
    for bits in (4, 6, 8)
    for signed in (True, False)
    for exponent in range(1, 6)
    if 0 <= bits - signed - exponent <= 7
]
every_format = pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
# Ours has no infinity and no NaN: E4M3's and E5M2's largest numbers are NaN or infinite elsewhere, and left out.
OTHERS = {
    "E2M1": (ml_dtypes.float4_e2m1fn, 0.5, 100.0),
    "E2M3": (ml_dtypes.float6_e2m3fn, 0.125, 100.0),
    "E3M2": (ml_dtypes.float6_e3m2fn, 0.0625, 100.0),
    "E4M3": (ml_dtypes.float8_e4m3fn, 2.0**-9, 460.0),
    "E5M2": (ml_dtypes.float8_e5m2, 2.0**-16, 57344.0),
}


def test_the_integers_of_the_4_bit_formats_are_those_of_the_paper():
    expected = {
        "E2M1": [0, 1, 2, 3, 4, 6, 8, 12],
        "E1M2": [0, 1, 2, 3, 4, 5, 6, 7],
        "E3M0": [0, 1, 2, 4, 8, 16, 32, 64],
        "uE2M2": [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28],
        "uE3M1": [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192],
        "uE1M3": list(range(16)),
    }
    for name, positive in expected.items():
        format = FloatFormat.parse(name)
        values = positive + [-value for value in positive] if format.signed else positive
        assert integers(format).tolist() == values
        assert format.largest == max(values)


@every_format
def test_a_name_reads_back_as_its_format(format):
    assert FloatFormat.parse(format.name) == format
    assert len(integers(format)) == format.codes == 2**format.bits


@pytest.mark.parametrize("name", ["E2", "e2m1", "E9M9", "E0M3", "E5M7", "uE1M0", "", "E2M1 ", None, 4])
def test_what_is_no_format_is_refused_by_its_name(name):
    with pytest.raises(QuantError):
        FloatFormat.parse(name)


@pytest.mark.parametrize("name", OTHERS)
def test_every_code_stands_for_what_it_does_in_ml_dtypes(name):
    dtype, step, limit = OTHERS[name]
    format = FloatFormat.parse(name)
    theirs = np.arange(format.codes, dtype=np.uint8).view(dtype).astype(np.float64)
    overlap = np.abs(theirs) <= limit
    assert overlap.sum() >= format.codes - 8
    assert (integers(format).numpy() * step)[overlap].tolist() == theirs[overlap].tolist()


@pytest.mark.parametrize("name", OTHERS)
@some
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50), st.integers(0, 2**32 - 1))
def test_numbers_and_ties_round_as_in_ml_dtypes(name, fractions, seed):
    dtype, step, limit = OTHERS[name]
    format = FloatFormat.parse(name)
    grid = integers(format).double().unique() * step
    ties = (grid[1:] + grid[:-1]) / 2
    spread = torch.tensor(fractions) * limit * 2.0 ** (seed % 16 - 15)
    x = torch.cat((spread, ties.float(), grid.float(), torch.nextafter(ties.float(), torch.tensor(0.0))))
    x = x[x.abs() <= limit]
    theirs = x.numpy().astype(dtype).astype(np.float32)
    assert quantise(x, format, torch.tensor(step)).tolist() == theirs.tolist()


@every_format
def test_rounding_is_to_the_nearest_and_ties_to_the_even_multiple_of_the_step(format):
    grid = sorted(set(integers(format).tolist()))
    for low, high in pairwise(grid):
        middle, step = Fraction(low + high, 2), high - low
        even = low if (low // step) % 2 == 0 else high
        above = torch.nextafter(torch.tensor(float(middle)), torch.tensor(math.inf))
        below = torch.nextafter(torch.tensor(float(middle)), torch.tensor(-math.inf))
        x = torch.stack((below, torch.tensor(float(middle)), above))
        assert quantise(x, format, torch.tensor(1.0)).tolist() == [low, even, high]


@every_format
def test_it_is_the_papers_formula(format):
    maxval, zero = 1.7, 0.0 if format.signed else -0.3
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, generator=generator) * maxval
    bias = 2**format.exponent - 1 - math.log2(maxval) + math.log2(2 - 2.0**-format.mantissa)
    u = (x.double() - zero).clamp(-maxval if format.signed else 0, maxval)
    level = (u.abs().clamp(min=1e-300).log2() + bias).floor().clamp(min=1)
    step = 2.0 ** (level - format.mantissa - bias)
    expected = step * (u / step).round() + zero
    scale = format.scale(torch.tensor(maxval))
    ours = quantise(x, format, scale, None if format.signed else torch.tensor(zero))
    assert torch.allclose(ours.double(), expected, rtol=1e-6, atol=1e-6)


@every_format
@some
@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=40), st.floats(2**-20, 2**20, width=32))
def test_codes_decode_to_the_fake_quantised_number_bit_for_bit(format, numbers, scale):
    x, scale = torch.tensor(numbers), torch.tensor(scale)
    zero = None if format.signed else -3 * scale
    codes = encode(x, format, scale, zero)
    quantised = quantise(x, format, scale, zero)
    assert torch.equal(decode(codes, format, scale, zero).view(torch.int32), quantised.view(torch.int32))


@every_format
def test_every_code_but_negative_zero_is_written_and_read(format):
    codes = torch.arange(format.codes, dtype=torch.uint8)
    again = encode(decode(codes, format, torch.tensor(0.25)), format, torch.tensor(0.25))
    if format.signed:
        codes[format.codes // 2] = 0
    assert torch.equal(again, codes)


@every_format
def test_what_lies_outside_saturates(format):
    x = torch.tensor([math.inf, 3e38, -3e38, -math.inf])
    end = float(format.largest)
    low = -end if format.signed else 0.0
    assert quantise(x, format, torch.tensor(1.0)).tolist() == [end, end, low, low]


def test_nan_stays_nan_and_has_no_code():
    x = torch.tensor([0.0, math.nan])
    assert quantise(x, FloatFormat(2, 1), torch.tensor(1.0)).isnan().tolist() == [False, True]
    with pytest.raises(QuantError, match="1 of 2 numbers are NaN"):
        encode(x, FloatFormat(2, 1), torch.tensor(1.0))


def test_negative_zero_is_never_made():
    x = torch.tensor([-0.0, -0.4, -1e-30])
    assert not quantise(x, FloatFormat(2, 1), torch.tensor(1.0)).signbit().any()
    assert encode(x, FloatFormat(2, 1), torch.tensor(1.0)).tolist() == [0, 0, 0]


def test_a_scale_for_every_channel_quantises_each_as_it_would_be_alone():
    weight = torch.randn(5, 7)
    scale = FloatFormat(2, 1).scale(weight.abs().amax(1, keepdim=True))
    rows = [quantise(row, FloatFormat(2, 1), one) for row, one in zip(weight, scale, strict=True)]
    assert torch.equal(quantise(weight, FloatFormat(2, 1), scale), torch.stack(rows))


def test_the_gradient_passes_inside_the_grid_and_not_beyond_it():
    signed = torch.tensor([-13.0, -12.0, 0.3, 12.0, 12.1], requires_grad=True)
    quantise(signed, FloatFormat(2, 1), torch.tensor(1.0)).backward(torch.arange(1.0, 6.0))
    assert signed.grad.tolist() == [0, 2, 3, 4, 0]
    unsigned = torch.tensor([-1.1, -1.0, 3.0, 27.0, 27.5], requires_grad=True)
    quantise(unsigned, FloatFormat(2, 2, False), torch.tensor(1.0), torch.tensor(-1.0)).sum().backward()
    assert unsigned.grad.tolist() == [0, 1, 1, 1, 0]


@some
@given(st.sampled_from([4, 6, 8]), st.integers(0, 3), st.integers(0, 33), st.integers(0, 1000))
def test_packed_codes_unpack_to_themselves(bits, rows, count, seed):
    codes = torch.randint(1 << bits, (rows, 2, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (rows, 2, packed_size(count, bits))
    assert torch.equal(unpack(packed, bits, count), codes)


def test_packing_starts_at_the_lowest_bit():
    assert pack(torch.tensor([0x1, 0x2, 0xF], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]
    codes = [1, 2, 3, 63, 7]
    stream = sum(code << (6 * place) for place, code in enumerate(codes))
    assert pack(torch.tensor(codes, dtype=torch.uint8), 6).tolist() == list(stream.to_bytes(4, "little"))


def test_codes_and_sizes_that_do_not_fit_are_refused():
    with pytest.raises(QuantError, match="a code is 16"):
        pack(torch.tensor([3, 16], dtype=torch.uint8), 4)
    with pytest.raises(QuantError, match="5 codes of 4 bits take 3 bytes: 2"):
        unpack(torch.zeros(2, dtype=torch.uint8), 4, 5)
    with pytest.raises(QuantError, match="choose 4, 6 or 8"):
        pack(torch.zeros(2, dtype=torch.uint8), 5)
