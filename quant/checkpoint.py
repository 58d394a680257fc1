"""Packed layers in a file: their codes, one after the other, and a header that says what the codes mean.

A layer `x` of N outputs and K inputs is stored as the tensors

    x.codes   (N, ceil(K * bits / 8)) uint8, see `quant.formats.pack`; bits is 4, 6 or 8, whatever holds its formats
    x.choice  (N,) uint8, which of its formats is each channel's
    x.scale   (N,) float32, and x.bias (N,) float32 where it has one

and, in the header, a JSON object of names like

    {"x": {"formats": ["E2M1", "E1M2"], "activation": {"format": "uE2M2", "scale": 0.05, "zero": -0.17}}}

where activation is null if the inputs are not quantised. To read them: `expect_` makes room for the tensors in a model
that has no memory yet, whoever reads files fills it, and `unpack_` makes layers of it. Nothing in a file is trusted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quant.config import BITS
from quant.convert import replace_
from quant.errors import QuantError
from quant.formats import FloatFormat, pack, packed_size, unpack
from quant.packed import Activation, PackedLinear

# The key of the JSON in a safetensors file's metadata.
HEADER = "msfp"
MAX_FORMATS = 255


class StoredLinear(nn.Module):
    """A packed layer as a file has it: what its tensors mean, and room for them."""

    codes: Tensor
    choice: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        size: tuple[int, int],
        biased: bool,
        formats: tuple[FloatFormat, ...],
        activation: Activation | None,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.size, self.formats, self.activation = size, formats, activation
        self.bits = stored_bits(formats)
        rows, width = size[0], packed_size(size[1], self.bits)
        self.register_buffer("codes", torch.empty(rows, width, dtype=torch.uint8, device=device))
        self.register_buffer("choice", torch.empty(rows, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(rows, device=device))
        self.register_buffer("bias", torch.empty(rows, device=device) if biased else None)

    def unpack(self) -> PackedLinear:
        """Raises QuantError: see `PackedLinear`, or a bias that is not finite."""
        if self.bias is not None and not bool(self.bias.isfinite().all()):
            raise QuantError("bias holds a number that is not finite")
        codes = unpack(self.codes, self.bits, self.size[1])
        return PackedLinear(codes, self.formats, self.choice, self.scale, self.bias, self.activation)


def stored_bits(formats: Iterable[FloatFormat]) -> int:
    """Bits of a code in a file that any of the formats fits."""
    return min(bits for bits in BITS if bits >= max(format.bits for format in formats))


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict, with packed layers as files have them."""
    packed = {name: part for name, part in model.named_modules() if isinstance(part, PackedLinear)}
    tensors: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        name = key.rpartition(".")[0]
        if name not in packed:
            tensors[key] = tensor
        elif f"{name}.codes" not in tensors:
            tensors |= {f"{name}.{part}": value for part, value in _layer_tensors(packed[name]).items()}
    return tensors


def _layer_tensors(layer: PackedLinear) -> dict[str, Tensor]:
    rows = layer.out_features
    tensors = {"codes": pack(layer.codes(), stored_bits(layer.formats))}
    tensors |= {"choice": layer.choice[:rows], "scale": layer.scale[:rows]}
    return tensors if layer.bias is None else {**tensors, "bias": layer.bias[:rows]}


def headers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What the header says of every packed layer, by name."""
    found: dict[str, dict[str, Any]] = {}
    for name, part in model.named_modules():
        if isinstance(part, PackedLinear):
            kept = part.activation
            grid = None if kept is None else {"format": kept.format.name, "scale": kept.scale, "zero": kept.zero}
            found[name] = {"formats": [format.name for format in part.formats], "activation": grid}
    return found


def read_headers(text: str) -> dict[str, Any]:
    """The layers of a file's header. Raises QuantError: it is not a JSON object."""
    try:
        layers = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise QuantError(f"the header '{HEADER}' is not JSON ({str(error)[:100]})") from error
    if not isinstance(layers, dict):
        raise QuantError(f"the header '{HEADER}' is a {type(layers).__name__}: it must be a JSON object")
    return layers


def expect_(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Puts a `StoredLinear` in the place of every linear layer that the header names, on the same device.

    layers: of `read_headers`.  Raises QuantError naming the layer: the model has no such one, or its header is wrong.
    """
    known = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    for name, header in layers.items():
        if name not in known:
            raise QuantError(f"the header '{HEADER}' names layer '{name[:120]}': the model has no such linear layer")
        layer = known[name]
        try:
            formats, activation = _parse(header)
        except QuantError as error:
            raise QuantError(f"layer '{name}': {error}") from error
        size, device = (layer.out_features, layer.in_features), layer.weight.device
        replace_(model, name, StoredLinear(size, layer.bias is not None, formats, activation, device))


def _parse(header: Any) -> tuple[tuple[FloatFormat, ...], Activation | None]:
    if not isinstance(header, dict) or set(header) != {"formats", "activation"}:
        raise QuantError(f"its header is {str(header)[:80]}: it must have formats and activation, and nothing else")
    names, grid = header["formats"], header["activation"]
    if not isinstance(names, list) or not 1 <= len(names) <= MAX_FORMATS:
        raise QuantError(f"its formats are {str(names)[:80]}: they must be a list of 1 to {MAX_FORMATS} names")
    formats = tuple(FloatFormat.parse(name) for name in names)
    if unsigned := [format.name for format in formats if not format.signed]:
        raise QuantError(f"its weights have the format {unsigned[0]}: weights have signed ones")
    if grid is None:
        return formats, None
    if not isinstance(grid, dict) or set(grid) != {"format", "scale", "zero"}:
        raise QuantError(f"its activation is {str(grid)[:80]}: it must have format, scale and zero, and nothing else")
    if any(isinstance(grid[key], bool) or not isinstance(grid[key], (int, float)) for key in ("scale", "zero")):
        raise QuantError(f"its activation is {str(grid)[:80]}: scale and zero must be numbers")
    return formats, Activation(FloatFormat.parse(grid["format"]), _number(grid["scale"]), _number(grid["zero"]))


def _number(value: float) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise QuantError(f"a number of {len(str(value))} digits is larger than any float") from error


def unpack_(model: nn.Module) -> None:
    """Puts a packed layer in the place of every `StoredLinear`, one after the other.

    Raises QuantError naming the layer: what was read is no packed layer.
    """
    for name, part in list(model.named_modules()):
        if isinstance(part, StoredLinear):
            try:
                layer = part.unpack()
            except QuantError as error:
                raise QuantError(f"layer '{name}': {error}") from error
            replace_(model, name, layer.train(part.training))
