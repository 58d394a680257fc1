"""Choosing and merging tokens by their scores, as functions of tensors.

TokenCarve: arXiv 2503.10501 and its public code. Equal scores: the lower index goes first, on every device.
Shapes: B samples, N tokens, K kept, M merged, d hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mllm.contribution import lengths
from mllm.kernels import rows_at


@dataclass(frozen=True)
class Selection:
    """kept: (B, K) int64, ascending.

    merged: (B, M, 2) int64, ascending: a token that is gone, and the kept one that it is part of now; None: no method
        that merges.
    tokens: (B, K, d), what stands in the kept places; None: what stood there before.
    """

    kept: Tensor
    merged: Tensor | None = None
    tokens: Tensor | None = None


def descending(scores: Tensor) -> Tensor:
    """scores: (B, N). Returns the tokens by falling score, of equal ones the lower index first."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def top(scores: Tensor, keep: int) -> Tensor:
    """scores: (B, N). Returns the highest, (B, keep), ascending by index."""
    return descending(scores)[:, :keep].sort(-1).values


def points(scores: Tensor) -> Tensor:
    """scores: (B, N). Returns N for the highest down to 1 for the lowest, (B, N) float64 (TokenCarve's code)."""
    batch, count = scores.shape
    falling = torch.arange(count, 0, -1, dtype=torch.float64, device=scores.device)
    return torch.empty_like(scores, dtype=torch.float64).scatter_(1, descending(scores), falling.expand(batch, -1))


def spread(count: int, keep: int, device: torch.device) -> Tensor:
    """Evenly spaced places, (keep,)."""
    return (2 * torch.arange(keep, device=device) + 1) * count // (2 * keep)


def draw(count: int, keep: int, seed: int, device: torch.device) -> Tensor:
    """Places by chance, (keep,), ascending; the same on every device."""
    chance = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return chance[:keep].sort().values.to(device)


def carve(tokens: Tensor, products: Tensor, total: Tensor, keep: int) -> Selection:
    """TokenCarve's two stages.

    tokens: (B, N, d).  products: (B, N, N), their `gram`.  total: (B, N), the fused ranks.

    The best 1.5 `keep` tokens are halved: those of the lower half that are most like one of the upper half, by cosine,
    are merged into it as a plain mean, until `keep` are left. Where there are fewer than 1.5 `keep`, fewer are merged;
    of an odd number the upper half has one more (our choice).
    """
    reserve = min(keep + keep // 2, tokens.shape[1])
    low, merging = reserve // 2, reserve - keep
    # What follows is in places among the reserved tokens, which stand by index.
    reserved, rank = descending(total)[:, :reserve].sort(-1)
    if not merging:
        return Selection(reserved, reserved.new_empty(len(reserved), 0, 2))
    lower = rank >= reserve - low
    columns = reserved[:, None].expand(-1, reserve, -1)
    length = lengths(products).gather(1, reserved)
    alike = rows_at(products, reserved).gather(2, columns).masked_fill(lower[:, None], -torch.inf) / length[:, None]
    best, target = alike.max(-1)
    falling = descending((best / length).masked_fill(~lower, -torch.inf))
    gone, stays = falling[:, :merging].sort(-1).values, falling[:, merging:].sort(-1).values
    target = target.gather(1, gone)

    # Where every token is now; a product, as adding rows by index has no fixed order on a GPU.
    owner = torch.arange(reserve, device=gone.device).expand_as(reserved).scatter(1, gone, target)
    parts = (owner[:, None] == stays[..., None]).float()
    means = (parts @ rows_at(tokens, reserved).float()) / parts.sum(-1, keepdim=True)
    merged = torch.stack((reserved.gather(1, gone), reserved.gather(1, target)), -1)
    return Selection(reserved.gather(1, stays), merged, means.to(tokens.dtype))
