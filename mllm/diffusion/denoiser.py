"""A network that foretells the noise in a row of numbers: residual blocks that time and condition shift and scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.config import check_sizes
from mllm.errors import PolicyError


@dataclass(frozen=True)
class DenoiserConfig:
    """numbers: of a row.  width: of the residual stream; a block is `expand` times as wide inside.  depth: blocks.
    condition: numbers that come with a row, 0 for none.
    """

    numbers: int
    width: int = 128
    depth: int = 3
    expand: int = 2
    condition: int = 0

    def __post_init__(self) -> None:
        check_sizes(self, {"numbers": (1, 1 << 20), "width": (2, 1 << 15), "depth": (1, 256), "expand": (1, 16)})
        check_sizes(self, {"condition": (0, 1 << 24)})


def sinusoids(times: Tensor, size: int) -> Tensor:
    """times: (B,). Returns (B, size) float32, cosines before sines, of periods from 2 pi to 20000 pi."""
    half = size // 2
    rates = torch.exp(-math.log(10_000) * torch.arange(half, device=times.device) / half)
    turned = times.float()[:, None] * rates
    return F.pad(torch.cat((turned.cos(), turned.sin()), -1), (0, size % 2))


class Block(nn.Module):
    """DiT's adaptive norm (Peebles & Xie, arXiv 2212.09748) around a SiLU MLP."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.modulate = nn.Linear(width, 3 * width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        """x, given: (B, width)."""
        shift, scale, gate = self.modulate(F.silu(given)).chunk(3, -1)
        inside = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        return x + gate * self.fc2(F.silu(self.fc1(inside)))


class Denoiser(nn.Module):
    """forward(x, times, condition): x (B, numbers), times (B,), condition (B, condition) or None -> (B, numbers).

    Raises PolicyError: a condition is missing, or not asked for.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.enter = nn.Linear(config.numbers, width)
        self.time1, self.time2 = nn.Linear(width, width), nn.Linear(width, width)
        self.condition = nn.Linear(config.condition, width) if config.condition else None
        self.blocks = nn.ModuleList(Block(width, config.expand * width) for _ in range(config.depth))
        self.leave = nn.Linear(width, config.numbers)

    def forward(self, x: Tensor, times: Tensor, condition: Tensor | None = None) -> Tensor:
        if (self.condition is None) != (condition is None):
            raise PolicyError(
                f"the denoiser takes a condition of {self.config.condition} numbers: look at what was given"
            )
        given = self.time2(F.silu(self.time1(sinusoids(times, self.config.width).to(x.dtype))))
        if self.condition is not None and condition is not None:
            given = given + self.condition(condition)
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, given)
        return self.leave(x)
