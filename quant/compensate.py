"""Weights whose rounding makes up for itself, and a bias that makes up for the rest: nothing of it costs at run time.

Of its inputs x a layer keeps q, their numbers on its grid. Columns of W are rounded one after the other, those of the
largest inputs first, and the ones that follow make up for each, so that V q stays near W q (GPTQ, Frantar et al., arXiv
2210.17323, with its damping, and the order of its authors' code). A bias then takes the mean of what is left (our
choice):

    c = b + W E[x] - V E[q]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quant.errors import QuantError
from quant.formats import FloatFormat, round_to_grid
from quant.packed import Activation
from quant.search import WeightGrid

DAMPING = 0.01
# Columns that are rounded before what they cost reaches the others.
BLOCK = 128


class Moments:
    """Sums over the inputs x of a layer, and over q, what it keeps of them; float64.

    square: (K, K), of q q^T.  given, kept: (K,), of x and of q.  count: of inputs.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.square = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.given, self.kept = (torch.zeros(size, dtype=torch.float64, device=device) for _ in range(2))
        self.count = 0

    def add(self, x: Tensor, q: Tensor) -> None:
        """x, q: (..., K)."""
        x, q = (rows.flatten(0, -2).float() for rows in (x, q))
        self.square += q.T @ q
        self.given += x.sum(0, dtype=torch.float64)
        self.kept += q.sum(0, dtype=torch.float64)
        self.count += len(x)


@torch.no_grad()
def observe(model: nn.Module, run: Callable[[], object], grids: Mapping[str, Activation | None]) -> dict[str, Moments]:
    """Moments of the inputs of those linear layers of the model that `grids` names, with the grid of each one's inputs.

    run: calls the model; see `quant.calibration.calibrate`.  Raises QuantError: a layer did not run.
    """
    found: dict[str, Moments] = {}

    def see(name: str, layer: nn.Module, given: tuple[Any, ...]) -> None:
        x, grid = given[0].detach(), grids[name]
        if name not in found:
            found[name] = Moments(x.shape[-1], x.device)
        found[name].add(x, x if grid is None else grid.quantise(x))

    with ExitStack() as stack:
        for name in grids:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(partial(see, name)).remove)
        run()
    for name in grids:
        if name not in found or not found[name].count:
            raise QuantError(f"layer '{name}' did not run again: give the function that it was calibrated with")
    return found


def compensate(
    weight: Tensor, bias: Tensor | None, grid: WeightGrid, moments: Moments, damping: float = DAMPING
) -> tuple[Tensor, Tensor | None]:
    """weight: (N, K), bias: (N,) or None, of a layer whose inputs have these moments.

    damping: share of the mean square of an input that is added to each one's, so that there is an inverse.
    Returns the numbers on the grid, (N, K) float32, and the bias, (N,) float32 or None.
    Raises QuantError: moments of other sizes, or none that are finite.
    """
    if moments.square.shape != (weight.shape[1], weight.shape[1]):
        raise QuantError(f"moments of {len(moments.square)} inputs are not of a weight of {weight.shape[1]}")
    square, given, kept = (sums / moments.count for sums in (moments.square, moments.given, moments.kept))
    if not bool(square.isfinite().all() and given.isfinite().all()):
        raise QuantError("the moments of its inputs are not finite: look at what the layer was given")
    weight = weight.detach()
    level = float(square.diagonal().sum()) / max(1, len(square)) or 1.0
    order = square.diagonal().argsort(descending=True)
    damped = square + damping * level * torch.eye(len(square), dtype=torch.float64, device=square.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    columns = torch.empty_like(weight, dtype=torch.float32)
    for index, format in enumerate(grid.formats):
        rows = grid.choice == index
        columns[rows] = round_columns(weight[rows][:, order].float(), format, grid.scale[rows], upper)
    rounded = torch.empty_like(columns)
    rounded[:, order] = columns
    if bias is not None:
        bias = (bias.detach().double() + weight.double() @ given - rounded.double() @ kept).float()
    return rounded, bias


def round_columns(weight: Tensor, format: FloatFormat, scale: Tensor, upper: Tensor) -> Tensor:
    """GPTQ's rounding (algorithm 1 of the paper).

    weight: (N, K).  scale: (N,), of the format.
    upper: (K, K), the upper Cholesky factor of the inverse of the inputs' second moments.  Returns (N, K).
    """
    weight, rounded = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        part, factor = weight[:, block], upper[block, block]
        errors = torch.empty_like(part)
        for column in range(part.shape[1]):
            rounded[:, start + column] = round_to_grid(part[:, column] / scale, format) * scale
            errors[:, column] = (part[:, column] - rounded[:, start + column]) / factor[column, column]
            part[:, column + 1 :] -= errors[:, column, None] * factor[column, column + 1 :]
        weight[:, start + BLOCK :] -= errors @ upper[block, start + BLOCK :]
    return rounded
