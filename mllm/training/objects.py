"""Where is what an instruction may name? An auxiliary head that asks the visual tokens by an object's words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ObjectHead(nn.Module):
    """One attention of an object's words over the visual tokens, which shall fall where the object is seen.

    It ties words to sights for every object of every frame, where an episode's own instruction is about a single one: a
    small model learns from it what things look like in far fewer scenes. For training only; our choice.

    names: token ids of every object's words.
    """

    def __init__(self, hidden: int, names: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.names = [list(ids) for ids in names]
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key = nn.Linear(hidden, hidden, bias=False)

    def forward(self, embed: Callable[[Tensor], Tensor], visual: Tensor) -> Tensor:
        """embed: from token ids to vectors.  visual: (B, N, hidden). Returns scores, (B, names, N)."""
        words = torch.stack([embed(torch.tensor(ids, device=visual.device)).mean(0) for ids in self.names])
        asked = self.query(F.rms_norm(words, words.shape[-1:]))
        keys = self.key(F.rms_norm(visual, visual.shape[-1:]))
        return asked @ keys.mT / visual.shape[-1] ** 0.5  # type: ignore[no-any-return]


def object_loss(scores: Tensor, objects: np.ndarray) -> Tensor:
    """The cross-entropy of the scores with where objects are, over those that are seen; 0 without any.

    scores: (B, names, N), N tokens of every camera in turn, each a square row by row.
    objects: (B, names, cameras, 2), see `mllm.demonstrations.Demonstration.objects`.
    """
    batch, names, cameras, _ = objects.shape
    side = math.isqrt(scores.shape[-1] // cameras)
    wanted = torch.from_numpy(weights_of_tokens(objects, side)).to(scores)
    likely = scores.view(batch, names, cameras, side * side).log_softmax(-1)
    return -(wanted * likely).sum() / wanted.sum().clamp(min=1)


def weights_of_tokens(places: np.ndarray, side: int) -> np.ndarray:
    """places: (..., 2) row and column in [0, 1], or NaN. Returns (..., side * side) float32: the share of every token
    of a square, bilinear between the four whose centres are nearest; it adds up to 1, or to 0 for NaN.
    """
    seen = np.isfinite(places).all(-1)
    along = np.clip(np.nan_to_num(places) * side - 0.5, 0, side - 1)[..., None]  # tokens from the first one's centre
    rows, columns = np.moveaxis(np.clip(1 - np.abs(along - np.arange(side)), 0, None), -2, 0)
    weights = rows[..., :, None] * columns[..., None, :] * seen[..., None, None]
    return weights.reshape(*seen.shape, side * side).astype(np.float32)
