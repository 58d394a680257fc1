"""The model's inner operations, each by the fastest of torch's kernels for its device, type and shape.

On a CPU torch multiplies float32 matrices by MKL, which leaves half the width of other makers' AVX-512 units unused,
and bfloat16 ones and convolutions by oneDNN, which does not; its RMS norm is a dozen passes over memory; and its fused
attention is slow in bfloat16, most of all backward. Here these go other ways, which differ by rounding only. On other
devices everything is torch's own.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from quant.packed import PackedLinear

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Where a vector has 256 bits MKL is the faster one, by an eighth in training.
WIDE = ONEDNN and torch.backends.cpu.get_cpu_capability() == "AVX512"
# Of weights that oneDNN has laid out for itself, a product is the faster one in either case, most of all of few rows.
LAYS_OUT = ONEDNN and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
# A layer with more weights is not to take twice the memory.
MODEST = 1 << 23
# Below so many rows oneDNN's set-up costs more than it saves, unless there are more weights than so many.
ONEDNN_ROWS = 8
LARGE = 1 << 19
# One row times so many weights or fewer is over before another thread has woken up.
SMALL = 1 << 17


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: (..., K), weight: (N, K), bias: (N,). Returns x weight^T + bias, (..., N), as `F.linear` does."""
    if not _is_ours(x, weight):
        return F.linear(x, weight, bias)
    size = x.shape[-1]
    if WIDE and x.numel() >= (2 if weight.numel() > LARGE else ONEDNN_ROWS) * size:
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return _Product.apply(x, weight, bias)
        return _onednn(x, weight, bias)
    if x.numel() == size and weight.numel() > SMALL and weight.is_contiguous():
        return _row_product(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """By `product`; and two rows or more without gradients on a CPU from weights that oneDNN has laid out for itself.

    That is done once for all numbers of rows, and again when the weights are others; what is written behind autograd's
    back, by `weight.data`, goes unnoticed. They take as much memory again, and are part of no copy and no checkpoint.
    """

    # Which weights, which version of them, and laid out. They are held, so that no others come to lie in their place.
    _laid_out: tuple[Tensor, int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._lays_out(x):
            return _onednn(x, self._weight_laid_out(), self.bias)
        return product(x, self.weight, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_laid_out"}

    def _lays_out(self, x: Tensor) -> bool:
        weight = self.weight
        return (
            LAYS_OUT
            and not torch.is_grad_enabled()
            and _is_ours(x, weight)
            and x.numel() > self.in_features
            and weight.numel() <= MODEST
            and not (torch.compiler.is_compiling() or weight.is_inference())
        )

    def _weight_laid_out(self) -> Tensor:
        weight, known = self.weight, self._laid_out
        if known is None or known[0].data_ptr() != weight.data_ptr() or known[1] != weight._version:
            held = weight.detach()
            known = self._laid_out = held, weight._version, torch.ops.mkldnn._reorder_linear_weight(held, None)
        return known[2]


def matrix_weights(module: nn.Module) -> int:
    """How many weights a module's linear layers have, packed ones (`quant.packed`) too."""
    layers = (part for part in module.modules() if isinstance(part, (nn.Linear, PackedLinear)))
    return sum(layer.in_features * layer.out_features for layer in layers)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: (..., d), weight: (d,). Returns x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, arXiv 1910.07467)."""
    if x.device.type != "cpu" or x.dtype == torch.float64 or torch.compiler.is_compiling():
        return F.rms_norm(x, weight.shape, weight, eps)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps)
    return (x * _inverse_rms(x, eps)).mul_(weight).to(x.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool = False) -> Tensor:
    """softmax(query key^T / sqrt(D) + bias) value.

    query: (B, H, T, D), key and value: (B, G, S, D).  bias: what `(B or 1, 1 or H, T, S)` broadcasts to, 0 or -inf,
    of the query's type.  causal: a row sees those up to its own, in place of a bias.  Returns (B, H, T, D).
    """
    heads, groups = query.shape[1], key.shape[1]
    if query.device.type != "cpu" or query.dtype == torch.float32:
        return F.scaled_dot_product_attention(query, key, value, bias, is_causal=causal, enable_gqa=heads != groups)
    if heads != groups:
        key, value = (part.repeat_interleave(heads // groups, 1) for part in (key, value))
    scores = torch.matmul(query / math.sqrt(query.shape[-1]), key.transpose(2, 3))
    if causal:
        bias = torch.full(scores.shape[2:], -torch.inf, dtype=scores.dtype).triu(1)
    if bias is not None:
        scores = scores + bias
    return torch.matmul(scores.softmax(-1, dtype=scores.dtype), value)


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """x: (B, T, d), index: (B, K) into T. Returns (B, K, d), row by row, where `gather` would go number by number."""
    batch, count, size = x.shape
    first = torch.arange(0, batch * count, count, device=index.device)[:, None]
    return x.reshape(-1, size).index_select(0, (index + first).flatten()).view(batch, -1, size)


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is not left to torch."""
    here = x.device.type == "cpu" and x.dtype == torch.float32 and weight.dtype == torch.float32
    return here and not torch.is_autocast_enabled("cpu")


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if torch.compiler.is_compiling():
        return _opaque_onednn(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# torch.compile takes every call of oneDNN's product for one of its own, with weights packed beforehand, and fails.
@torch.library.custom_op("flashvla::onednn_linear", mutates_args=())
def _opaque_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@_opaque_onednn.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


if ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _operations(x: torch.Size, weight: torch.Size, *rest: object, **out: object) -> int:
        """For `torch.utils.flop_counter`, which knows torch's own products only."""
        return 2 * x.numel() * weight[0]


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


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.addcmul(_constant(eps), length, length, value=1 / x.shape[-1]).rsqrt_()


@cache
def _constant(value: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value)


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


class _RMSNorm(torch.autograd.Function):
    """Three passes each way, where autograd through torch's takes thirty."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        inverse = _inverse_rms(x, eps)
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, weight)
        return (unit * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        unit, inverse, weight = ctx.saved_tensors
        along = gradient * unit
        mean = (along @ weight.to(along.dtype)).unsqueeze(-1) / weight.numel()
        to_x = torch.addcmul((gradient * weight).to(unit.dtype), unit, mean, value=-1).mul_(inverse)
        return to_x.to(gradient.dtype), along.flatten(0, -2).sum(0).to(weight.dtype), None
