"""From a model of linear layers to one of packed layers: see the inputs, then search and replace.

    run = lambda: model(batch)
    report = quantize_(model, MSFPConfig(bits=4), calibrate(model, run), run)

`calibrate` is `quant.calibration`'s. The model runs again because only then the grids are known, which inputs are
rounded to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.calibration import Inputs
from quant.compensate import Moments, compensate, observe
from quant.config import MSFPConfig, find
from quant.errors import QuantError
from quant.formats import encode
from quant.packed import Activation, PackedLinear
from quant.search import Candidates, WeightGrid, input_candidates, search_input, search_weight, weight_candidates

# Numbers of moments, K x K for a layer, that are in memory together: 2 GB.
MOMENTS = 1 << 28


@dataclass(frozen=True)
class Packed:
    """A layer that was quantised.

    outputs, inputs: its size.  formats: of its weights -> channels that have it.
    weight_nmse: squared difference of its weights, over their square.
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
    run: Callable[[], object] | None = None,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
) -> Report:
    """Replaces linear layers by packed ones, one after the other, so that one layer at most is in memory twice.

    calibration: of `quant.calibration.calibrate` on this model; a layer that did not run is left alone.
    run: what `calibrate` was given, where `config.compensate`. It is called once for as many layers as their moments
        leave room in memory; later ones then see what the earlier ones, quantised, make.
    filter_fn: (name, layer) -> whether to quantise it, beside `config.exclude`.
    Raises QuantError: the calibration is of another model, a weight has a number that is not finite, or `run` is
    missing or leaves out a layer.
    """
    if config.compensate and run is None:
        raise QuantError("MSFPConfig.compensate needs `run`, what calibrate was given: give it, or set it to false")
    known = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if strange := [name for name in calibration if name not in known]:
        raise QuantError(f"calibration saw layer '{strange[0]}', which the model lacks: calibrate this model")
    ends = (next(iter(calibration)), list(calibration)[-1]) if calibration else ()
    reasons = {name: _reason(name, layer, config, calibration, filter_fn) for name, layer in known.items()}
    chosen = [name for name in calibration if not reasons[name]]
    inputs = {name: _search_inputs(name, config, calibration[name], name in ends) for name in chosen}
    done: list[Packed] = []
    for part in _parts({name: known[name].in_features for name in chosen}):
        grids = {name: inputs[name].activation for name in part}
        moments = observe(model, run, grids) if config.compensate and run else {}
        for name in part:
            layer, report = _pack(name, known.pop(name), config, inputs[name], moments.pop(name, None))
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


@dataclass(frozen=True)
class _Inputs:
    """How a layer's inputs are kept, and of how many bits its weights will be; see `Packed`."""

    bits: int
    activation: Activation | None
    nmse: float | None
    anomalous: str


def _search_inputs(name: str, config: MSFPConfig, seen: Inputs, end: bool) -> _Inputs:
    """end: whether the layer runs first or last in its model."""
    bits, act_bits = config.bits_of(name, end)
    anomalous = _anomalous(name, config, seen)
    if act_bits is None:
        return _Inputs(bits, None, None, anomalous)
    tried = input_candidates(config.family, act_bits, bool(anomalous))
    return _Inputs(bits, *search_activation(seen.sample, seen.minimum, seen.maximum, tried), anomalous)


def _parts(sizes: Mapping[str, int]) -> Iterator[Sequence[str]]:
    """sizes: inputs of each layer. Yields the names in parts, of one layer or as many as `MOMENTS` has room for."""
    part: list[str] = []
    held = 0
    for name, size in sizes.items():
        if part and held + size**2 > MOMENTS:
            yield part
            part, held = [], 0
        part.append(name)
        held += size**2
    if part:
        yield part


def _pack(
    name: str, layer: nn.Linear, config: MSFPConfig, inputs: _Inputs, moments: Moments | None
) -> tuple[PackedLinear, Packed]:
    """The layer as `config` wants it, and what became of it.  moments: None rounds to the nearest."""
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    try:
        grid = search_weight(weight, weight_candidates(config.family, inputs.bits))
        rounded, shifted = (weight, bias) if moments is None else compensate(weight, bias, grid, moments)
    except QuantError as error:
        raise QuantError(f"layer '{name}': {error}") from error
    packed = pack_weight(rounded, shifted, grid, inputs.activation).train(layer.training)
    largest = torch.tensor([one.largest for one in grid.formats], device=grid.scale.device)
    clips = grid.scale * largest[grid.choice.long()]
    counts = grid.choice.bincount(minlength=len(grid.formats)).tolist()
    formats = {format.name: count for format, count in zip(grid.formats, counts, strict=True)}
    clip = float(clips.median()) if len(clips) else 0.0
    square = float(weight.double().square().sum()) or 1.0
    nmse = float((packed.weight().double() - weight.double()).square().sum()) / square
    size = (packed.out_features, packed.in_features)
    return packed, Packed(name, *size, formats, nmse, clip, inputs.activation, inputs.nmse, inputs.anomalous)


def quantise_layer(name: str, layer: nn.Linear, config: MSFPConfig, seen: Inputs) -> tuple[PackedLinear, Packed]:
    """One layer as `config` wants it, its weights at the nearest numbers, and what became of it."""
    return _pack(name, layer, config, _search_inputs(name, config, seen, end=False), None)


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
