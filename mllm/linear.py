"""Products with a linear layer's weights, each by the fastest of torch's exact kernels for its shape.

On a CPU torch multiplies float32 matrices by MKL, which leaves half the width of other makers' processors unused, and
bfloat16 ones and convolutions by oneDNN, which does not. Here oneDNN multiplies float32 matrices too, forward and
backward: the sums are the same to rounding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Below so many rows oneDNN's set-up costs more than it saves.
ONEDNN_ROWS = 8
# One row times so many weights or fewer is over before another thread has woken up.
SMALL = 1 << 17


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: (..., K), weight: (N, K), bias: (N,). Returns x weight^T + bias, (..., N), as `F.linear` does."""
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32
    if plain or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    size = x.shape[-1]
    if ONEDNN and x.numel() >= ONEDNN_ROWS * size:
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return _Product.apply(x, weight, bias)
        return _onednn(x, weight, bias)
    if x.numel() == size and weight.numel() > SMALL and weight.is_contiguous():
        return _row_product(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """By `product`."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _row_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One row, multiplied by blocks of rows of the weights as a batch: the plain call reads the weights in one thread
    at half the memory's speed.
    """
    count, size = weight.shape
    blocks = math.gcd(count, 8)
    # A column by its strides too: with those of a row, the product would copy the weights.
    column = x.reshape(1, 1, size).expand(blocks, 1, size).transpose(1, 2)
    row = torch.bmm(weight.view(blocks, -1, size), column).view(*x.shape[:-1], count)
    return row if bias is None else row + bias


class _Product(torch.autograd.Function):
    """oneDNN's product has no gradient of its own."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, weight.shape[0])
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            _onednn(gradient, weight.t()) if to_x else None,
            _onednn(rows.t(), x.reshape(-1, weight.shape[1]).t()) if to_weight else None,
            rows.sum(0) if ctx.biased and to_bias else None,
        )
