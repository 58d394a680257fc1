"""The mini's vision tower: a vision transformer whose patches are cut by three convolutions.

A convolutional stem learns from little data where a single patch projection does not (Xiao et al., arXiv 2106.14881).
timm has such stems only on hybrids of fixed sizes, the smallest of which costs ten times the mini's whole step; and
every camera here has a position embedding of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.config import TowerConfig
from mllm.kernels import Linear, attention

PATCH = 16


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = Linear(width, mlp_width)
        self.fc2 = Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, width)."""
        batch, count, width = x.shape
        query, key, value = self.qkv(self.norm1(x)).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = attention(query, key, value, None)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, count, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class ConvViT(nn.Module):
    """Images of `image_size` pixels to one token for every 16 x 16 of them."""

    def __init__(self, config: TowerConfig, cameras: int) -> None:
        super().__init__()
        self.embed_dim = width = config.width
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 4, 4, 4),
            nn.GELU(),
            nn.Conv2d(width // 4, width // 2, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, 2, 1),
        )
        self.patches = (config.image_size // PATCH) ** 2
        self.pos_embed = nn.Parameter(torch.randn(cameras, self.patches, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, cameras, 3, S, S). Returns (B, cameras * (S / 16)^2, width); no camera sees another's image."""
        batch, cameras = images.shape[:2]
        patches = self.stem(images.flatten(0, 1)).flatten(2).transpose(1, 2)
        x = (patches.view(batch, cameras, -1, self.embed_dim) + self.pos_embed).flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x).view(batch, -1, self.embed_dim)
