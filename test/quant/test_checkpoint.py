"""Packed layers survive a file bit for bit, and a file that lies is an error naming the layer."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

from quant.checkpoint import expect_, headers, read_headers, stored_tensors, unpack_  # noqa: E402
from quant.errors import QuantError  # noqa: E402
from quant.formats import FloatFormat  # noqa: E402
from quant.packed import Activation, PackedLinear  # noqa: E402

FORMATS = {4: ("E1M2", "E2M1", "E3M0"), 6: ("E1M4", "E2M3", "E3M2", "E4M1"), 8: ("E2M5", "E3M4", "E4M3", "E5M2")}
GRIDS = [
    None,
    Activation(FloatFormat.parse("E2M1"), 0.1),
    Activation(FloatFormat.parse("uE2M2"), 1 / 3, -0.17),
    Activation(FloatFormat.parse("uE4M4"), 1e-9),
]


def make(size, bits=4, biased=True, activation=GRIDS[2], seed=0):
    generator = torch.Generator().manual_seed(seed)
    formats = tuple(map(FloatFormat.parse, FORMATS[bits]))
    codes = torch.randint(0, 1 << bits, size, generator=generator).to(torch.uint8)
    codes[codes == 1 << (bits - 1)] = 0  # negative zero
    choice = torch.randint(0, len(formats), size[:1], generator=generator).to(torch.uint8)
    scale = torch.rand(size[0], generator=generator) + 1e-3
    bias = torch.randn(size[0], generator=generator) if biased else None
    return PackedLinear(codes, formats, choice, scale, bias, activation)


def wrapped(layer):
    return nn.ModuleDict({"a": layer, "norm": nn.LayerNorm(3)})


def loaded(tensors, layers, size, biased=True):
    """A model as whoever reads files makes it."""
    with torch.device("meta"):
        model = wrapped(nn.Linear(size[1], size[0], biased))
    expect_(model, layers)
    model.to_empty(device="cpu")
    model.load_state_dict(tensors)
    unpack_(model)
    return model


@given(
    st.integers(1, 40), st.integers(1, 70), st.sampled_from([4, 6, 8]), st.booleans(), st.sampled_from(GRIDS),
    st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_layer_survives_its_file(count, width, bits, biased, activation, seed):
    layer = make((count, width), bits, biased, activation, seed)
    model = wrapped(layer)
    tensors, layers = stored_tensors(model), read_headers(json.dumps(headers(model)))
    assert set(tensors) == {"a.codes", "a.choice", "a.scale", "norm.weight", "norm.bias", *(["a.bias"] * biased)}
    assert tensors["a.codes"].shape == (count, -(-width * bits // 8))
    again = loaded(tensors, layers, (count, width), biased)["a"]
    assert (again.formats, again.activation) == (layer.formats, layer.activation)
    ours, theirs = layer.state_dict(), again.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    x = torch.randn(3, width)
    assert torch.equal(layer(x), again(x))


def test_a_file_of_four_bits_takes_half_a_byte_a_weight_and_nine_a_channel():
    tensors = stored_tensors(wrapped(make((64, 1024))))
    own = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("a."))
    assert own == 64 * 1024 // 2 + 64 * (1 + 4 + 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(b=h["a"]), "names layer 'b': the model has no such linear layer"),
        (lambda h: h.update(norm=h["a"]), "names layer 'norm'"),
        (lambda h: h.update(a=3), "layer 'a': its header is 3"),
        (lambda h: h["a"].pop("activation"), "layer 'a': its header is .*: it must have formats and activation"),
        (lambda h: h["a"].update(code="x"), "layer 'a': its header is"),
        (lambda h: h["a"].update(formats=[]), r"layer 'a': its formats are \[\]"),
        (lambda h: h["a"].update(formats=["E2M1"] * 256), "layer 'a': its formats are"),
        (lambda h: h["a"].update(formats="E2M1"), "layer 'a': its formats are E2M1"),
        (lambda h: h["a"].update(formats=["E9M9"]), "layer 'a': FloatFormat.exponent is 9"),
        (lambda h: h["a"].update(formats=[7]), "layer 'a': 7 is no number format"),
        (lambda h: h["a"].update(formats=["uE2M2"]), "layer 'a': its weights have the format uE2M2"),
        (lambda h: h["a"].update(activation=[]), r"layer 'a': its activation is \[\]"),
        (lambda h: h["a"]["activation"].update(scale="1"), "layer 'a': its activation is .*: scale and zero must be"),
        (lambda h: h["a"]["activation"].update(scale=True), "layer 'a': its activation is"),
        (lambda h: h["a"]["activation"].update(scale=float("nan")), "layer 'a': Activation.scale is nan"),
        (lambda h: h["a"]["activation"].update(scale=-1), "layer 'a': Activation.scale is -1"),
        (lambda h: h["a"]["activation"].update(scale=1e-60), "layer 'a': Activation.scale is 1e-60"),
        (lambda h: h["a"]["activation"].update(scale=10**400), "layer 'a': a number of 401 digits"),
        (lambda h: h["a"]["activation"].update(zero=0.5), "layer 'a': Activation.zero is 0.5"),
        (lambda h: h["a"]["activation"].update(zero=float("-inf")), "layer 'a': Activation.zero is -inf"),
    ],
)
def test_a_header_that_lies_is_an_error_naming_the_layer(change, message):
    model = wrapped(make((5, 9)))
    tensors, layers = stored_tensors(model), read_headers(json.dumps(headers(model)))
    change(layers)
    with pytest.raises(QuantError, match=message):
        loaded(tensors, layers, (5, 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["a.scale"].__setitem__(3, torch.nan), "layer 'a': scale of channel 3 is nan"),
        (lambda t: t["a.scale"].__setitem__(1, torch.inf), "layer 'a': scale of channel 1 is inf"),
        (lambda t: t["a.scale"].__setitem__(0, -1.0), "layer 'a': scale of channel 0 is -1"),
        (lambda t: t["a.scale"].__setitem__(0, 0.0), "layer 'a': scale of channel 0 is 0"),
        (lambda t: t["a.bias"].__setitem__(2, torch.nan), "layer 'a': bias holds a number that is not finite"),
        (lambda t: t["a.choice"].__setitem__(0, 3), "layer 'a': choice holds . to 3: there are 3 formats"),
    ],
)
def test_tensors_that_lie_are_an_error_naming_the_layer(change, message):
    model = wrapped(make((5, 9)))
    tensors = {name: tensor.clone() for name, tensor in stored_tensors(model).items()}
    change(tensors)
    with pytest.raises(QuantError, match=message):
        loaded(tensors, headers(model), (5, 9))


def test_a_code_beyond_its_format_is_an_error():
    model = wrapped(make((5, 9), 6))
    header = headers(model)
    header["a"]["formats"][0] = "E2M1"  # of 4 bits, in a file of 6
    tensors = stored_tensors(model)
    tensors["a.choice"][0], tensors["a.codes"][0, 0] = 0, 63
    with pytest.raises(QuantError, match="layer 'a': a code is"):
        loaded(tensors, header, (5, 9))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "3", "null"])
def test_a_header_that_is_no_json_object_is_an_error(text):
    with pytest.raises(QuantError, match="the header 'msfp' is"):
        read_headers(text)
