"""Which format and which range cost a tensor least: MSFP's mixup-sign search (arXiv 2505.21591), and baselines by the
same search.

The squared error of every candidate is exact, from sorted values and their running sums: a candidate then costs one
look-up for each step of its grid, however many values there are. Which ranges are tried is our choice, as the paper
tells none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.errors import QuantError
from quant.formats import FloatFormat, integers

FAMILIES = ("msfp", "signed", "int", "int-minmax")
SIGNED = {
    4: ("E1M2", "E2M1", "E3M0"),
    6: ("E1M4", "E2M3", "E3M2", "E4M1"),
    8: ("E1M6", "E2M5", "E3M4", "E4M3", "E5M2"),
}
UNSIGNED = {
    4: ("uE1M3", "uE2M2", "uE3M1"),
    6: ("uE2M4", "uE3M3", "uE4M2"),
    8: ("uE1M7", "uE3M5", "uE4M4", "uE5M3"),
}
# Look-ups held in memory at once.
LOOKUPS = 1 << 21
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Candidates:
    """What is tried for a tensor.

    signed, unsigned: formats.
    signed_factors, unsigned_factors: ranges, as a share of the largest magnitude, or of the largest value above the
        zero point.
    zeros: how many zero points are tried, evenly spaced from the smallest value to 0 (1: the smallest alone).
    """

    signed: tuple[FloatFormat, ...] = ()
    unsigned: tuple[FloatFormat, ...] = ()
    signed_factors: tuple[float, ...] = (1.0,)
    unsigned_factors: tuple[float, ...] = (1.0,)
    zeros: int = 1


def weight_candidates(family: str, bits: int) -> Candidates:
    """For weights, which are signed in every family.

    family: "msfp" and "signed" choose among the floating-point formats whose integers fit in a byte: others would take
        two in memory, and kernels twice as long. "int" is the integer grid with the same search of the range, and
        "int-minmax" the one whose range is the largest magnitude.
    """
    if family in ("int", "int-minmax"):
        formats: tuple[FloatFormat, ...] = (FloatFormat(1, bits - 2),)
    else:
        formats = tuple(format for format in map(FloatFormat.parse, SIGNED[bits]) if format.one_byte)
    return Candidates(signed=formats, signed_factors=(1.0,) if family == "int-minmax" else _spread(0.2, 2.0, 100))


def input_candidates(family: str, bits: int, anomalous: bool) -> Candidates:
    """For a layer's inputs.

    anomalous: whether "msfp" may drop the sign for a zero point, which the paper does behind GELU, SiLU and Mish. The
        two of integers may always, as INT4 schemes do; "signed" never does.
    """
    if family == "int-minmax":
        return Candidates(unsigned=(FloatFormat(1, bits - 1, False),))
    if family == "int":
        signed: tuple[FloatFormat, ...] = (FloatFormat(1, bits - 2),)
        unsigned: tuple[FloatFormat, ...] = (FloatFormat(1, bits - 1, False),)
    else:
        signed = tuple(map(FloatFormat.parse, SIGNED[bits]))
        drops = family == "msfp" and anomalous
        unsigned = tuple(map(FloatFormat.parse, UNSIGNED[bits])) if drops else ()
    return Candidates(signed, unsigned, _spread(0.05, 1.2, 100), _spread(0.05, 1.2, 40), zeros=8)


def _spread(low: float, high: float, count: int) -> tuple[float, ...]:
    return tuple(torch.linspace(low, high, count, dtype=torch.float64).tolist())


@dataclass(frozen=True)
class WeightGrid:
    """A format and a scale for every output channel.

    formats: those that any channel has.  choice: (N,) uint8, which of them.  scale: (N,) float32.
    error: (N,) float64, sum of the squared errors.  nmse: of the whole weight, the squared error over the square.
    """

    formats: tuple[FloatFormat, ...]
    choice: Tensor
    scale: Tensor
    error: Tensor
    nmse: float


@dataclass(frozen=True)
class InputGrid:
    """The best scale and zero point of one format; nmse: the squared error over the square, both sums."""

    format: FloatFormat
    scale: float
    zero: float
    nmse: float


def search_weight(weight: Tensor, candidates: Candidates) -> WeightGrid:
    """weight: (N, K). Every output channel has the format and the range of its smallest squared error.

    A channel of zeros has a scale that fits the others. Raises QuantError: a number that is not finite.
    """
    check_finite(weight, "the weight")
    magnitudes = weight.detach().float().abs()
    largest = magnitudes.amax(1) if weight.shape[1] else magnitudes.new_zeros(len(weight))
    largest = torch.where(largest > 0, largest, largest.max() if (largest > 0).any() else 1.0)
    factors = torch.tensor(candidates.signed_factors, dtype=torch.float64, device=weight.device)
    error = torch.full((len(weight),), torch.inf, dtype=torch.float64, device=weight.device)
    choice, scale = torch.zeros_like(error, dtype=torch.uint8), torch.zeros_like(largest)
    rows = max(1, LOOKUPS // (len(factors) << max(format.bits - 1 for format in candidates.signed)))
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        known = SortedRows(magnitudes[part])
        for index, format in enumerate(candidates.signed):
            scales = format.scale(largest[part, None] * factors).clamp(min=TINY)
            errors = known.errors(integers(format, weight.device)[: format.codes // 2], scales)
            least, place = errors.min(1)
            better = least < error[part]
            error[part] = torch.where(better, least, error[part])
            choice[part] = torch.where(better, index, choice[part])
            scale[part] = torch.where(better, scales.gather(1, place[:, None])[:, 0], scale[part])
    used = choice.unique()
    square = float(magnitudes.double().square().sum())
    return WeightGrid(
        tuple(candidates.signed[index] for index in used.tolist()),
        torch.searchsorted(used, choice).to(torch.uint8),
        scale,
        error,
        float(error.sum()) / square if square else 0.0,
    )


def search_input(sample: Tensor, minimum: float, maximum: float, candidates: Candidates) -> list[InputGrid]:
    """One grid for all inputs of a layer.

    sample: (n,), whose squared error counts.  minimum, maximum: of all inputs, which ranges and zero points go by.
    Returns the best grid of every format, the best of all first.
    Raises QuantError: no sample, or a number that is not finite.
    """
    sample = sample.detach().float().flatten()
    if not len(sample):
        raise QuantError("there is no sample of the inputs: run the model on at least one observation")
    check_finite(sample, "the sample of inputs")
    square = float(sample.double().square().sum()) or 1.0
    found: list[InputGrid] = []

    def keep(format: FloatFormat, errors: Tensor, scales: Tensor, zeros: Tensor) -> None:
        place = int(errors.argmin())
        nmse = float(errors[place]) / square
        found.append(InputGrid(format, float(scales[place]), float(zeros[place]), nmse))

    largest = max(-minimum, maximum) or 1.0
    known = SortedRows(sample.abs()[None]) if candidates.signed else None
    for format in candidates.signed:
        scales = format.scale(largest * torch.tensor(candidates.signed_factors, dtype=torch.float64)).clamp(min=TINY)
        assert known is not None
        errors = known.errors(integers(format, sample.device)[: format.codes // 2], scales[None].to(sample.device))
        keep(format, errors[0], scales, torch.zeros_like(scales))
    known = SortedRows(sample[None]) if candidates.unsigned else None
    for format in candidates.unsigned:
        steps = torch.linspace(min(minimum, 0.0), 0.0, max(candidates.zeros, 2), dtype=torch.float64)
        steps = steps[: candidates.zeros].float().unique()
        factors = torch.tensor(candidates.unsigned_factors, dtype=torch.float64)
        ranges = (max(maximum, 0.0) - steps.double())[:, None] * factors
        ranges = torch.where(ranges > 0, ranges, factors * largest)
        scales = format.scale(ranges).clamp(min=TINY).flatten()
        zeros = steps.repeat_interleave(len(factors))
        assert known is not None
        device = sample.device
        errors = known.errors(integers(format, device), scales[None].to(device), zeros[None].to(device))
        keep(format, errors[0], scales, zeros)
    return sorted(found, key=lambda grid: grid.nmse)


def check_finite(tensor: Tensor, what: str) -> None:
    wrong = int((~tensor.isfinite()).sum())
    if wrong:
        raise QuantError(
            f"{wrong} of the {tensor.numel()} numbers of {what} are not finite: nothing can stand for them"
        )


class SortedRows:
    """Rows of numbers, R of n, for which any grid's squared error takes a look-up a step."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.double().sort(1).values
        self._sums = F.pad(self._values.cumsum(1), (1, 0))
        self._square = self._values.square().sum(1, keepdim=True)

    def errors(self, grid: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
        """grid: (G,) integers, ascending; scales: (R, S), zeros: (R, S) or None.

        Returns (R, S) float64: of each row the sum of squared distances to the nearest of grid * scale + zero.
        """
        level = grid.double()
        rows, tried = scales.shape
        each = max(1, LOOKUPS // max(1, rows * len(grid)))
        parts: list[Tensor] = []
        for start in range(0, tried, each):
            scale = scales[:, start : start + each, None].double()
            points = scale * level
            if zeros is not None:
                points = points + zeros[:, start : start + each, None].double()
            # Of every point, how many values are nearest to it, and their sum.
            middles = (points[..., 1:] + points[..., :-1]) / 2
            cuts = F.pad(torch.searchsorted(self._values, middles.flatten(1)).view_as(middles), (1, 0))
            cuts = F.pad(cuts, (0, 1), value=self._values.shape[1])
            sums = self._sums.gather(1, cuts.flatten(1)).view(cuts.shape).diff()
            # sum (x - p)^2 = sum x^2 + sum p (p - 2 x)
            parts.append(self._square + (points * (points * cuts.diff() - 2 * sums)).sum(-1))
        return torch.cat(parts, 1).clamp_(min=0)
