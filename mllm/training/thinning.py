"""Fewer visual tokens in training, so that a policy does not come to need those that are dropped later.

The papers' methods need no training, and neither do ours; but a small model that has always had all of its tokens loses
more without them than one that has not (our choice). What is drawn favours none of the methods that it is made for.

A model that answers token by token learns to do it as `CompressConfig.trim` off has it: all tokens of the answer see
all visual ones in the layers before the drop. It is to act so too.
"""

from __future__ import annotations

import numpy as np

from mllm.compress import CompressConfig, Compressor
from mllm.generate import compressor
from mllm.vla import VLA

METHODS = ("flashvla", "tokencarve", "random")
LAYERS = (1, 2)  # after which tokens are dropped
SHARES = (1 / 8, 1 / 2)  # of the tokens, that stay


def draw_compression(generator: np.random.Generator, tokens: int, images: int, layers: int) -> CompressConfig:
    """How a step's decoder, of so many layers, drops visual tokens: so many, an equal number of every image."""
    each = tokens // images
    low, high = (max(1, round(share * each)) for share in SHARES)
    return CompressConfig(
        str(generator.choice(METHODS)),
        keep=images * int(generator.integers(low, high, endpoint=True)),
        layer=int(generator.choice([layer for layer in LAYERS if layer < layers])),
        per_camera=bool(generator.integers(2)),
        seed=int(generator.integers(1 << 31)),
    )


def thinning(model: VLA, generator: np.random.Generator) -> Compressor | None:
    """The decoder's hook of one step in training, for `VLA.one_pass` and `VLA.teacher_forced`."""
    tokens, images = model.vision_backbone.tokens, len(model.config.cameras)
    drawn = draw_compression(generator, tokens, images, model.config.decoder.num_hidden_layers)
    return compressor(model, drawn, taught=True)
