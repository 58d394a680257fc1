"""Words learn to point: auxiliary losses on what the decoder attends to, where demonstrations say where objects are.

An episode's instruction is about one object, and habit answers for it: in a scene that is always alike a small model
needs neither the word nor what it stands for. These losses are about every object of every frame. In the first layer a
word that names an object attends to where each camera sees it; in the second, the answer attends to the word that the
instruction has. For training only; our choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mllm.decoder import DecoderLayer, Kept, LayerState, TokenHook
from mllm.vla import VLA

BEFORE = 4  # positions between the image and an object's name: proprioception, and "pick up the"


class Watch:
    """A `TokenHook` that remembers the second layer, and drops what `hook` does. Models of two layers do not call it.

    dropped: positions that were gone before the second layer.
    """

    def __init__(self, hook: TokenHook | None = None) -> None:
        self.second: LayerState | None = None
        self.dropped = 0
        self._hook = hook

    def __call__(self, state: LayerState) -> Kept | None:
        if state.layer == 2:
            self.second = state
        kept = None if self._hook is None else self._hook(state)
        if kept is not None and state.layer == 1:
            self.dropped = state.hidden.shape[1] - kept.index.shape[1]
        return kept


def attention_of_words(model: VLA, visual: Tensor, words: Tensor, cameras: int) -> Tensor:
    """How words attend to the visual tokens in the decoder's first layer, in one head for each camera.

    visual: (B, N, hidden) of `VLA.visual_tokens`.  words: (K,) int64, token ids, each taken as if an instruction had it
    where it names its object. Returns scores before the softmax, (B, cameras, K, N).
    """
    decoder = model.language_model.model
    layer, count = cast(DecoderLayer, decoder.layers[0]), visual.shape[1]
    named = model.embed(words).to(visual.dtype).expand(len(visual), -1, -1)
    positions = torch.arange(1, count + len(words) + 1, device=visual.device)[None]
    positions[:, count:] = count + BEFORE + 1
    x = layer.input_layernorm(torch.cat((visual, named), 1))
    query, key, _ = layer.self_attn.project(x, decoder.rotary(positions, x.dtype))
    return _scores(query[:, :, count:], key[:, :, :count], cameras)


def pointing_loss(scores: Tensor, objects: np.ndarray) -> Tensor:
    """The cross-entropy of the scores with where objects are, over those that are seen; 0 without any.

    scores: (B, cameras, K, N) of `attention_of_words`, N tokens of every camera in turn, each a square row by row.
    objects: (B, K, cameras, 2), see `mllm.demonstrations.Demonstration.objects`.
    """
    batch, cameras, names, count = scores.shape
    own = torch.from_numpy(weights_of_tokens(objects.swapaxes(1, 2), math.isqrt(count // cameras))).to(scores)
    likely = scores.log_softmax(-1).view(batch, cameras, names, cameras, -1)
    loss = -sum((own[:, camera] * likely[:, camera, :, camera]).sum() for camera in range(cameras))
    return loss / own.sum().clamp(min=1)  # type: ignore[no-any-return]


def naming_loss(second: LayerState, prompt: int, places: Tensor) -> Tensor:
    """The cross-entropy of what the answer attends to, in the first head of the second layer, with the word that names
    the object; over the samples that have one.

    prompt: positions of the prompt in this layer, the last of which belongs to the answer.
    places: (B,) of `places_of_words`.
    """
    scores = _scores(second.query[:, :, prompt - 1 :], second.key[:, :, :prompt], 1)[:, 0]
    if second.valid is not None:
        scores = scores.masked_fill(~second.valid[:, None, :prompt], float("-inf"))
    known = places >= 0
    if not bool(known.any()):
        return scores.new_zeros(())
    rows = scores[known]
    return F.cross_entropy(rows.flatten(0, 1), places[known].repeat_interleave(rows.shape[1]))


def places_of_words(texts: Sequence[Sequence[int]], words: Sequence[int], prompt: int) -> Tensor:
    """(B,) int64: where in a prompt of so many positions, whose last is each text's last, the first of the words stands
    that a text has; -1 where it has none.
    """
    found = [next((place for place, word in enumerate(text) if word in words), None) for text in texts]
    return torch.tensor(
        [-1 if place is None else prompt - len(text) + place for place, text in zip(found, texts, strict=True)]
    )


def weights_of_tokens(places: np.ndarray, side: int) -> np.ndarray:
    """places: (..., 2) row and column in [0, 1], or NaN. Returns (..., side * side) float32: the share of every token
    of a square, bilinear between the four whose centres are nearest; it adds up to 1, or to 0 for NaN.
    """
    seen = np.isfinite(places).all(-1)
    along = np.clip(np.nan_to_num(places) * side - 0.5, 0, side - 1)[..., None]  # tokens from the first one's centre
    rows, columns = np.moveaxis(np.clip(1 - np.abs(along - np.arange(side)), 0, None), -2, 0)
    weights = rows[..., :, None] * columns[..., None, :] * seen[..., None, None]
    return weights.reshape(*seen.shape, side * side).astype(np.float32)


def _scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """query: (B, H, T, D), key: (B, G, S, D). Returns the first heads' scores, (B, heads, T, S)."""
    shared = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return query[:, :heads] @ shared[:, :heads].mT / query.shape[-1] ** 0.5
