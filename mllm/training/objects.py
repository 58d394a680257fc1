"""Where is what an instruction may name? An auxiliary loss on what words attend to, in the decoder's first layer."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
from torch import Tensor

from mllm.decoder import DecoderLayer
from mllm.vla import VLA

HEAD = 0  # of the first layer, the one that learns to point; our choice
BEFORE = 4  # positions between the image and an object's name: proprioception, and "pick up the"; our choice


def attention_of_words(model: VLA, visual: Tensor, words: Tensor) -> Tensor:
    """How a word that names an object attends to the visual tokens, in one head of the decoder's first layer.

    visual: (B, N, hidden) of `VLA.visual_tokens`.  words: (K,) int64, token ids, each taken as if an instruction had it
    where it names its object. Returns scores before the softmax, (B, K, N).
    """
    decoder = model.language_model.model
    layer, count = cast(DecoderLayer, decoder.layers[0]), visual.shape[1]
    named = model.embed(words).to(visual.dtype).expand(len(visual), -1, -1)
    positions = torch.arange(1, count + len(words) + 1, device=visual.device)[None]
    positions[:, count:] = count + BEFORE + 1
    x = layer.input_layernorm(torch.cat((visual, named), 1))
    query, key, _ = layer.self_attn.project(x, decoder.rotary(positions, x.dtype))
    scores = query[:, HEAD, count:] @ key[:, HEAD, :count].mT
    return scores / layer.self_attn.size**0.5


def object_loss(scores: Tensor, objects: np.ndarray) -> Tensor:
    """The cross-entropy of the scores with where objects are, over those that are seen; 0 without any.

    An episode's instruction is about one object, and this about every object of every frame: a small model learns from
    it what things look like, and what their names are, in far fewer scenes. For training only; our choice.

    scores: (B, K, N), N tokens of every camera in turn, each a square row by row.
    objects: (B, K, cameras, 2), see `mllm.demonstrations.Demonstration.objects`.
    """
    side = math.isqrt(scores.shape[-1] // objects.shape[2])
    wanted = torch.from_numpy(weights_of_tokens(objects, side)).to(scores).flatten(2)
    loss = -(wanted * scores.log_softmax(-1)).sum()
    return loss / wanted.sum().clamp(min=1)


def weights_of_tokens(places: np.ndarray, side: int) -> np.ndarray:
    """places: (..., 2) row and column in [0, 1], or NaN. Returns (..., side * side) float32: the share of every token
    of a square, bilinear between the four whose centres are nearest; it adds up to 1, or to 0 for NaN.
    """
    seen = np.isfinite(places).all(-1)
    along = np.clip(np.nan_to_num(places) * side - 0.5, 0, side - 1)[..., None]  # tokens from the first one's centre
    rows, columns = np.moveaxis(np.clip(1 - np.abs(along - np.arange(side)), 0, None), -2, 0)
    weights = rows[..., :, None] * columns[..., None, :] * seen[..., None, None]
    return weights.reshape(*seen.shape, side * side).astype(np.float32)
