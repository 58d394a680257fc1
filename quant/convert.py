"""From a model of linear layers to one of packed layers, in two passes: see the inputs, then search and replace.

    seen = calibrate(model, lambda: model(batch))
    report = quantize_(model, MSFPConfig(bits=4), seen)

`calibrate` is `quant.calibration`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.calibration import Inputs
from quant.config import MSFPConfig, find
from quant.errors import QuantError
from quant.formats import encode
from quant.packed import Activation, PackedLinear
from quant.search import Candidates, WeightGrid, input_candidates, search_input, search_weight, weight_candidates


@dataclass(frozen=True)
class Packed:
    """A layer that was quantised.

    outputs, inputs: its size.  formats: of its weights -> channels that have it.  weight_nmse: see `WeightGrid`.
    clip: the largest weight that a channel can have, the median of its channels.
    activation: of its inputs, or None.  input_nmse: see `InputGrid`.
    anomalous: why the inputs may drop their sign ("gelu", "silu", "mish", "statistics" or "config"), or "".
    """

    name: str
    outputs: int
    inputs: int
    formats: Mapping[str, int]
    weight_nmse: float
    clip: float
    activation: Activation | None
    input_nmse: float | None
    anomalous: str

    def to_json(self) -> dict[str, Any]:
        kept = self.activation
        shown = kept and {"format": kept.format.name, "scale": kept.scale, "zero": kept.zero, "range": kept.range}
        return {**asdict(self), "formats": dict(self.formats), "activation": shown}


@dataclass(frozen=True)
class Left:
    """A matrix, or a tensor of more dimensions, that stays as it was; kind: its module's, numbers: of its weight."""

    name: str
    kind: str
    numbers: int
    why: str


@dataclass(frozen=True)
class Report:
    """What `quantize_` did: layers in the order in which they run, and what it left alone."""

    layers: tuple[Packed, ...]
    left: tuple[Left, ...]

    def to_json(self) -> dict[str, Any]:
        return {"layers": [one.to_json() for one in self.layers], "left": [asdict(one) for one in self.left]}


@torch.no_grad()
def quantize_(
    model: nn.Module,
    config: MSFPConfig,
    calibration: Mapping[str, Inputs],
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
) -> Report:
    """Replaces linear layers by packed ones, one after the other, so that one layer at most is in memory twice.

    calibration: of `quant.calibration.calibrate` on this model; a layer that did not run is left alone.
    filter_fn: (name, layer) -> whether to quantise it, beside `config.exclude`.
    Raises QuantError: the calibration is of another model, or a weight has a number that is not finite.
    """
    known = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if strange := [name for name in calibration if name not in known]:
        raise QuantError(f"calibration saw layer '{strange[0]}', which the model lacks: calibrate this model")
    ends = (next(iter(calibration)), list(calibration)[-1]) if calibration else ()
    reasons = {name: _reason(name, layer, config, calibration, filter_fn) for name, layer in known.items()}
    done: list[Packed] = []
    for name, seen in calibration.items():
        if not reasons[name]:
            layer, report = quantise_layer(name, known.pop(name), config, seen, name in ends)
            replace_(model, name, layer)
            done.append(report)
    left = [
        Left(name, type(part).__name__, part.weight.numel(), reasons.get(name, "not a linear layer"))
        for name, part in model.named_modules()
        if isinstance(getattr(part, "weight", None), Tensor) and part.weight.dim() > 1
    ]
    return Report(tuple(done), tuple(left))


def _reason(
    name: str,
    layer: nn.Linear,
    config: MSFPConfig,
    calibration: Mapping[str, Inputs],
    filter_fn: Callable[[str, nn.Module], bool] | None,
) -> str:
    """Why a layer stays as it is; "" if it does not."""
    if (why := find(config.exclude, name)) is not None:
        return why
    if filter_fn is not None and not filter_fn(name, layer):
        return "the filter left it out"
    return "" if name in calibration else "it did not run in calibration"


def quantise_layer(
    name: str, layer: nn.Linear, config: MSFPConfig, seen: Inputs, end: bool = False
) -> tuple[PackedLinear, Packed]:
    """The layer as `config` wants it, and what became of it.  end: whether it runs first or last in its model."""
    bits, act_bits = config.bits_of(name, end)
    try:
        grid = search_weight(layer.weight, weight_candidates(config.family, bits))
    except QuantError as error:
        raise QuantError(f"layer '{name}': {error}") from error
    anomalous = _anomalous(name, config, seen)
    activation, input_nmse = None, None
    if act_bits is not None:
        tried = input_candidates(config.family, act_bits, bool(anomalous))
        activation, input_nmse = search_activation(seen.sample, seen.minimum, seen.maximum, tried)
    packed = pack_layer(layer, grid, activation)
    largest = torch.tensor([one.largest for one in grid.formats], device=grid.scale.device)
    clips = grid.scale * largest[grid.choice.long()]
    counts = grid.choice.bincount(minlength=len(grid.formats)).tolist()
    formats = {format.name: count for format, count in zip(grid.formats, counts, strict=True)}
    clip = float(clips.median()) if len(clips) else 0.0
    size = (packed.out_features, packed.in_features)
    return packed, Packed(name, *size, formats, grid.nmse, clip, activation, input_nmse, anomalous)


def _anomalous(name: str, config: MSFPConfig, seen: Inputs) -> str:
    given = find(config.anomalous, name)
    if given is not None:
        return "config" if given else ""
    return seen.follows or ("statistics" if seen.bounded else "")


def search_activation(
    sample: Tensor, minimum: float, maximum: float, candidates: Candidates
) -> tuple[Activation, float]:
    """The best grid of all, and its nmse; see `quant.search.search_input`."""
    best = search_input(sample, minimum, maximum, candidates)[0]
    return Activation(best.format, best.scale, best.zero), best.nmse


def pack_layer(layer: nn.Linear, grid: WeightGrid, activation: Activation | None) -> PackedLinear:
    """The layer with its weights on a grid that was found for them."""
    bias = None if layer.bias is None else layer.bias.detach()
    return pack_weight(layer.weight, bias, grid, activation).train(layer.training)


def pack_weight(weight: Tensor, bias: Tensor | None, grid: WeightGrid, activation: Activation | None) -> PackedLinear:
    """weight: (N, K), which becomes the nearest numbers of the grid.  bias: (N,) or None."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for index, format in enumerate(grid.formats):
        rows = grid.choice == index
        codes[rows] = encode(weight[rows], format, grid.scale[rows, None])
    return PackedLinear(codes, grid.formats, grid.choice, grid.scale, bias, activation)


def replace_(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts `layer` wherever the model has the one of that name, under whatever other names too."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for own, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, own, layer)
