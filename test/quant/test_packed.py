"""A packed layer computes what its codes say, and keeps them."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from quant.errors import QuantError  # noqa: E402
from quant.formats import FloatFormat, decode, quantise  # noqa: E402
from quant.packed import Activation, PackedLinear  # noqa: E402
from quant.tiles import tile, untile  # noqa: E402

FOUR = tuple(map(FloatFormat.parse, ("E1M2", "E2M1", "E3M0")))
EIGHT = tuple(map(FloatFormat.parse, ("E2M5", "E3M4", "E4M3", "E5M2")))


def layer(shape, formats=FOUR, activation=None, seed=0, bias=True):
    generator = torch.Generator().manual_seed(seed)
    count = shape[0]
    choice = torch.randint(0, len(formats), (count,), generator=generator)
    codes = torch.randint(0, formats[0].codes, shape, generator=generator).to(torch.uint8)
    scale = torch.rand(count, generator=generator) * 0.02 + 1e-3
    return PackedLinear(
        codes, formats, choice, scale, torch.randn(count, generator=generator) if bias else None, activation
    )


def dequantised(packed):
    codes, rows = packed.codes(), packed.choice[: packed.out_features].long()
    scale = packed.scale[: packed.out_features, None]
    return torch.stack(
        [decode(codes[n], packed.formats[rows[n]], scale[n]) for n in range(packed.out_features)]
    ).double()


@pytest.mark.parametrize("formats", [FOUR, EIGHT[:1], EIGHT[:2], EIGHT, (FloatFormat.parse("E1M6"),)], ids=str)
@pytest.mark.parametrize("name", ["E2M1", "uE2M2", "E2M5", "uE3M5"])
def test_the_layer_is_the_product_of_what_its_codes_and_its_inputs_stand_for(formats, name):
    format = FloatFormat.parse(name)
    activation = Activation(format, 3.0 / format.largest, 0.0 if format.signed else -0.28)
    packed = layer((19, 45), formats, activation)
    x = torch.randn(3, 5, 45, generator=torch.Generator().manual_seed(1))
    kept = quantise(x, format, torch.tensor(activation.scale), None if format.signed else torch.tensor(-0.28))
    expected = kept.double() @ dequantised(packed).T + packed.bias[:19].double()
    torch.testing.assert_close(packed(x).double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_without_a_grid_for_its_inputs_only_the_weights_are_quantised():
    packed = layer((19, 45))
    x = torch.randn(7, 45)
    expected = x.double() @ dequantised(packed).T + packed.bias[:19].double()
    torch.testing.assert_close(packed(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("formats", [FOUR, (FloatFormat.parse("E1M4"),), EIGHT, (FloatFormat.parse("E3M4"),)], ids=str)
def test_codes_come_back_as_they_went_in(formats):
    shape = (35, 50)
    choice = torch.randint(0, len(formats), shape[:1])
    half = formats[0].codes // 2
    codes = torch.randint(0, 2 * half, shape).to(torch.uint8)
    codes[codes == half] = 0  # negative zero
    assert torch.equal(PackedLinear(codes, formats, choice, torch.ones(35)).codes(), codes)


@given(st.integers(1, 40), st.integers(1, 70), st.sampled_from([torch.uint8, torch.int8, torch.int16]))
@settings(max_examples=40, deadline=None)
def test_tiles_hold_every_value_once_and_zeros_beside_them(count, size, dtype):
    values = torch.randint(1, 16, (count, size)).to(dtype)
    tiles = tile(values)
    assert torch.equal(untile(tiles, (count, size)), values)
    total = (tiles & 15).sum() + (tiles >> 4).sum() if dtype is torch.uint8 else tiles.sum()
    assert int(total) == int(values.sum())


@pytest.mark.parametrize("shape", [(512, 4096), (768, 192)])
def test_a_layer_of_4_bits_takes_little_more_than_a_quarter_of_its_size_in_float16(shape):
    packed = layer(shape, activation=Activation(FOUR[1], 0.3), bias=False)
    held = sum(buffer.numel() * buffer.element_size() for buffer in packed.buffers())
    assert held <= 0.27 * 2 * shape[0] * shape[1]


def test_a_state_with_larger_sums_than_the_layers_own_computes_the_same():
    small = PackedLinear(torch.zeros(3, 800, dtype=torch.uint8), FOUR[2:], torch.zeros(3), torch.ones(3))
    large = PackedLinear(torch.full((3, 800), 7, dtype=torch.uint8), FOUR[2:], torch.zeros(3), torch.ones(3))
    assert (small.sums.dtype, large.sums.dtype) == (torch.int16, torch.int32)
    small.load_state_dict(large.state_dict())
    x = torch.randn(2, 800)
    assert torch.equal(small(x), large(x))
    torch.testing.assert_close(small(x), 64 * x.sum(1, keepdim=True).expand(2, 3), rtol=1e-4, atol=1e-2)


def test_copies_pickles_and_state_dicts_compute_the_same():
    activation = Activation(FOUR[1], 0.3)
    packed, other = layer((20, 40), activation=activation), layer((20, 40), activation=activation, seed=5)
    x = torch.randn(4, 40)
    expected = packed(x)
    other.load_state_dict(packed.state_dict())
    for same in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), other):
        assert torch.equal(same(x), expected)


def test_a_state_with_another_layers_formats_is_refused():
    state = layer((20, 40)).state_dict()
    with pytest.raises(QuantError, match="choice holds 2: there are 1 formats"):
        layer((20, 40), FOUR[:1]).load_state_dict(state)


@pytest.mark.parametrize("name", ["E2M1", "uE2M2"])
def test_a_row_with_a_nan_gives_nan_and_infinity_is_the_end_of_the_grid(name):
    format = FloatFormat.parse(name)
    packed = layer((20, 40), activation=Activation(format, 0.25, 0.0 if format.signed else -0.5))
    x = torch.randn(5, 40)
    x[1, 7], x[3, 2] = torch.nan, torch.inf
    y = packed(x)
    assert y.isnan().all(1).tolist() == [False, True, False, False, False]
    x[3, 2] = 1e30
    assert torch.equal(packed(x)[3], y[3])


class Watched(TorchDispatchMode):
    """Notes every operation's name, and the devices of its tensors."""

    def __init__(self):
        super().__init__()
        self.names, self.devices = set(), set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        answer = operation(*args, **(kwargs or {}))
        self.names.add(operation.overloadpacket.__name__)
        self.devices |= {part.device.type for part in tree_leaves((args, kwargs, answer)) if isinstance(part, Tensor)}
        return answer


@pytest.mark.parametrize(
    "activation", [None, Activation(FOUR[1], 0.3), Activation(FloatFormat.parse("uE2M2"), 0.3, -1)]
)
@pytest.mark.parametrize("formats", [FOUR, EIGHT, (FloatFormat.parse("E1M6"),)], ids=str)
def test_the_reference_takes_nothing_from_the_host_so_that_a_cuda_graph_can_record_it(formats, activation):
    packed = layer((20, 40), formats, activation).to("meta")
    with Watched() as watched:
        packed(torch.empty(2, 40, device="meta"))
    assert watched.devices == {"meta"}
    assert "lift_fresh" not in watched.names  # of torch.tensor, which copies a number of Python's


@pytest.mark.parametrize("activation", [None, Activation(FOUR[1], 0.3)])
@pytest.mark.parametrize("shape", [(2, 39), (2, 41), ()])
def test_inputs_of_another_size_are_refused(shape, activation):
    with pytest.raises(QuantError, match=r"the layer takes \(\.\.\., 40\)"):
        layer((20, 40), activation=activation)(torch.zeros(shape))


def test_a_gradient_is_refused():
    with pytest.raises(QuantError, match="no gradient"):
        layer((20, 40))(torch.randn(2, 40, requires_grad=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.full((4, 6), 16, dtype=torch.uint8)}, "a code is 16"),
        ({"codes": torch.zeros(4, 6)}, "codes are torch.float32"),
        ({"formats": (FloatFormat.parse("uE2M2"),)}, r"\['uE2M2'\]: name one or more signed"),
        ({"formats": ()}, "none"),
        ({"choice": torch.ones(4)}, "choice holds 1 to 1: there are 1 formats"),
        ({"choice": torch.zeros(5)}, r"choice has shape \(5,\)"),
        ({"scale": torch.tensor([1.0, 1.0, torch.nan, 1.0])}, "scale of channel 2 is nan"),
        ({"scale": torch.tensor([1.0, 0.0, 1.0, 1.0])}, "scale of channel 1 is 0.0"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\)"),
    ],
)
def test_what_makes_no_layer_is_an_error_that_names_it(change, message):
    arguments = {
        "codes": torch.zeros(4, 6, dtype=torch.uint8),
        "formats": FOUR[:1],
        "choice": torch.zeros(4),
        "scale": torch.ones(4),
    }
    with pytest.raises(QuantError, match=message):
        PackedLinear(**arguments | change)


@pytest.mark.parametrize(
    ("format", "scale", "zero", "message"),
    [
        ("E2M1", 0.0, 0.0, "scale is 0.0"),
        ("E2M1", torch.nan, 0.0, "scale is nan"),
        ("E2M1", 1e-60, 0.0, "scale is 1e-60: it must be a number of float32 above 0, 1.18e-38 to 3.4e"),
        ("E2M1", 1e300, 0.0, r"scale is 1e\+300"),
        ("uE2M2", 1.0, -1e300, r"zero is -1e\+300 with uE2M2: it must be 0 or less, down to -3.4e"),
        ("E2M1", 1.0, -1.0, "zero is -1.0 with E2M1: it must be 0"),
        ("uE2M2", 1.0, 0.5, "zero is 0.5 with uE2M2"),
    ],
)
def test_a_wrong_grid_of_inputs_is_an_error(format, scale, zero, message):
    with pytest.raises(QuantError, match=message):
        Activation(FloatFormat.parse(format), scale, zero)
