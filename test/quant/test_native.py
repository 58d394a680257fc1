"""The kernels give the reference's bits, whatever the formats, shapes, instructions and threads."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest

torch = pytest.importorskip("torch")

from hypothesis import assume, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from quant import native, ops  # noqa: E402
from quant.errors import QuantError  # noqa: E402
from quant.formats import FloatFormat  # noqa: E402
from quant.packed import Activation, PackedLinear  # noqa: E402

if not native.available():
    pytest.skip("the kernels are not built: there is no C compiler", allow_module_level=True)

WEIGHTS = [
    ("E1M2", "E2M1", "E3M0"),
    ("E1M1",),
    ("E1M4", "E2M3"),
    ("E2M3", "E3M2", "E4M1"),
    ("E1M6",),
    ("E2M5", "E3M4"),
]
SIGNED = ["E1M2", "E2M1", "E3M0", "E1M4", "E2M3", "E3M2", "E4M1", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2"]
UNSIGNED = ["uE1M3", "uE2M2", "uE3M1", "uE4M0", "uE2M4", "uE3M3", "uE4M2", "uE1M7", "uE3M5", "uE4M4", "uE5M3"]


@pytest.fixture(autouse=True, scope="module")
def _small_layers_too_are_divided_among_threads():
    worth, ops.WORTH_A_THREAD = ops.WORTH_A_THREAD, 1
    yield
    ops.WORTH_A_THREAD = worth


def layer(shape, weights, inputs, seed=0, bias=True):
    """Channels of every format, with codes at random."""
    formats = tuple(map(FloatFormat.parse, weights))
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(0, len(formats), shape[:1], generator=generator)
    codes = torch.randint(0, formats[0].codes, shape, generator=generator).to(torch.uint8)
    scale = torch.rand(shape[0], generator=generator) * 0.02 + 1e-3
    offset = torch.randn(shape[0], generator=generator) if bias else None
    format = FloatFormat.parse(inputs)
    step = float(torch.rand((), generator=generator)) + 0.01
    activation = Activation(format, step, 0.0 if format.signed else -2.3 * step)
    return PackedLinear(codes, formats, choice, scale, offset, activation)


def observations(rows, packed, seed=0):
    """(rows, K): of every size on the grid and beyond, halfway between its numbers, tiny, infinite and not a number."""
    generator = torch.Generator().manual_seed(seed)
    activation, shape = packed.activation, (rows, packed.in_features)
    size = torch.exp2(torch.rand(shape, generator=generator) * (math.log2(activation.format.largest) + 4) - 2)
    x = size * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)
    x = torch.where(torch.rand(shape, generator=generator) < 0.4, (x * 2).round() / 2, x) * activation.scale
    x = x + activation.zero
    rare = torch.randint(0, 200, shape, generator=generator)
    for case, value in enumerate((0.0, -0.0, 1e-42, 3e38, math.inf, -math.inf)):
        x[rare == case] = value
    x[(torch.rand(rows, generator=generator) < 0.1).nonzero(), :1] = math.nan
    return x


def bits(y):
    """Bits of a result; NaN has many, of which this makes one."""
    return y.nan_to_num(nan=7.5e-39, posinf=math.inf, neginf=-math.inf).view(torch.int32)


@given(
    st.sampled_from(native.available()),
    st.sampled_from([1, 2]),
    st.tuples(st.integers(0, 40), st.integers(0, 300) | st.integers(1000, 1100)),
    st.integers(0, 8) | st.integers(90, 110),
    st.sampled_from(WEIGHTS),
    st.sampled_from(SIGNED + UNSIGNED),
    st.booleans(),
    st.integers(0, 2**32),
)
@example(native.available()[-1], 1, (16, 32), 0, WEIGHTS[0], "E2M1", True, 0)
@example(native.available()[-1], 2, (16, 0), 3, WEIGHTS[0], "E2M1", True, 0)
@example(native.available()[-1], 2, (0, 16), 3, WEIGHTS[0], "E2M1", False, 0)
@settings(max_examples=60, deadline=None)
def test_the_bits_are_those_of_the_reference(name, threads, shape, rows, weights, inputs, bias, seed):
    packed = layer(shape, weights, inputs, seed, bias)
    assume(packed.native(torch.device("cpu")))
    x = observations(rows, packed, seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with native.instructions(name):
            assert torch.equal(bits(packed(x)), bits(packed.reference(x)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("inputs", [*SIGNED[:11], *UNSIGNED[:10]])
def test_sums_may_reach_every_bit_of_int32(inputs):
    """All weights and inputs are the largest, and as many as are exact: products added in too few bits would differ."""
    grid = FloatFormat.parse(inputs)
    for weights in map(FloatFormat.parse, ("E1M1", "E3M0", "E2M3", "E1M6", "E4M1", "E3M4")):
        count = min(300, (2**31 - 1) // (weights.largest * grid.largest))
        codes = torch.full((17, count), weights.codes // 2 - 1, dtype=torch.uint8)
        codes[1] += weights.codes // 2
        packed = PackedLinear(
            codes, (weights,), torch.zeros(17), torch.ones(17), torch.zeros(17), Activation(grid, 1.0)
        )
        assert packed.native(torch.device("cpu"))
        x = torch.full((3, count), 1e9)
        x[1] = -1e9
        expected = packed.reference(x)
        for name in native.available():
            with native.instructions(name):
                assert torch.equal(packed(x), expected), (weights, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", ["E2M1", "uE2M2"])
def test_inputs_of_every_type_and_stride_give_the_references_bits(dtype, inputs):
    packed = layer((21, 50), WEIGHTS[0], inputs)
    x = observations(36, packed).to(dtype)
    for strided in (x.view(2, 18, 50), x.T.contiguous().T, x.repeat(1, 2)[::3, ::2], x[0].expand(5, 50), x[3]):
        y = packed(strided)
        assert y.dtype is dtype
        assert y.shape == (*strided.shape[:-1], 21)
        assert torch.equal(bits(y.float()), bits(packed.reference(strided).float()))


def test_who_looks_on_sees_one_operator_and_the_same_bits():
    class Seen(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **kwargs or {})

    packed = layer((21, 50), WEIGHTS[0], "E2M1")
    x = torch.randn(4, 50)
    with Seen():
        y = packed(x)
    assert Seen.names.count("flashvla.packed_linear.default") == 1
    assert torch.equal(y, packed(x))


def test_the_operator_has_a_shape_without_values():
    packed = layer((21, 50), WEIGHTS[0], "E2M1").to("meta")
    held = (packed.tiles, packed.table, packed.choice, packed.scale, packed.bias, packed.sums)
    x = torch.empty(2, 3, 50, dtype=torch.bfloat16, device="meta")
    y = torch.ops.flashvla.packed_linear(x, *held, 21, packed.largest, *packed.activation.grid)
    assert (y.shape, y.dtype) == ((2, 3, 21), torch.bfloat16)


def test_a_layer_without_built_kernels_says_so_and_computes_the_same(monkeypatch):
    packed = layer((21, 50), WEIGHTS[0], "E2M1")
    x = torch.randn(4, 50)
    expected = packed(x)
    monkeypatch.setattr(native, "EXTENSION_SUFFIXES", [])
    native.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="kernels are not built"):
            assert torch.equal(packed(x), expected)
    finally:
        native.library.cache_clear()


def test_unknown_instructions_are_an_error_that_names_those_there_are():
    with pytest.raises(QuantError, match="'mmx': this processor has portable"), native.instructions("mmx"):
        pass
    assert native.chosen() == len(native.available()) - 1


@given(
    st.sampled_from(native.available()),
    st.tuples(st.integers(1, 40), st.integers(1, 300) | st.integers(1000, 1100)),
    st.integers(0, 8) | st.integers(90, 110),
    st.sampled_from(WEIGHTS),
    st.integers(-80, 100),  # below, a step times a scale is subnormal
    st.integers(0, 2**32),
)
@settings(max_examples=30, deadline=None)
def test_inputs_without_a_grid_are_kept_to_22_bits_of_their_rows_largest(name, shape, rows, weights, power, seed):
    packed = layer(shape, weights, "E2M1", seed)
    packed = PackedLinear(packed.codes(), packed.formats, packed.choice[: shape[0]], packed.scale[: shape[0]])
    assert packed.native(torch.device("cpu"))
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(seed)) * 2.0**power
    with native.instructions(name):
        y = packed(x)
    weight = packed.weight().double()
    bound = x.abs().amax(1, keepdim=True).double() * 2.0**-22 * weight.abs().sum(1)
    exact = x.double() @ weight.T
    assert bool(((y - exact).abs() <= bound + exact.abs() * 2.0**-22).all())
    assert native.chosen() == len(native.available()) - 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_without_a_grid_a_row_that_is_not_finite_gives_nan_and_zeros_give_the_bias(value):
    packed = layer((20, 40), WEIGHTS[0], "E2M1")
    packed = PackedLinear(packed.codes(), packed.formats, packed.choice[:20], packed.scale[:20], torch.arange(20.0))
    x = torch.zeros(3, 40)
    x[1, 3] = value
    y = packed(x)
    assert y.isnan().all(1).tolist() == [False, True, False]
    assert torch.equal(y[2], torch.arange(20.0))
