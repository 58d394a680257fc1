"""From a prompt to action tokens: greedily one by one, or all in one pass."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mllm.decoder import Kept, KVCache, LayerState, TokenHook
from mllm.vla import VLA


class ActionDecoder:
    """Decodes the action tokens of prompts; its cache is allocated once for prompts that fit and serves every call.

    restricted: choose among action tokens only, which reads 256 rows of the head instead of all; False lets any token
    win, as the published code does. The two differ only where the model wants to say something that is no action.
    hook: token selection in the prefill; see `mllm.decoder`.
    kept: (B, K) int64, places in the last prompt that the hook left in, ascending, -1 where a sample kept fewer; None
        where it left in all.
    """

    def __init__(self, model: VLA, restricted: bool = True, hook: TokenHook | None = None) -> None:
        self.model, self.config = model, model.config
        self.ids = self.config.action_ids if restricted else (0, self.config.decoder.vocab_size)
        self.hook = hook
        self.kept: Tensor | None = None
        self._cache: KVCache | None = None

    def _empty_cache(self, batch: int, slots: int) -> KVCache:
        cache = self._cache
        if cache is None or cache.capacity < slots or cache.batch != batch:
            cache = KVCache(self.config.decoder, batch, slots, self.model.dtype, self.model.device)
            self._cache = cache
        cache.clear()
        return cache

    def _best(self, hidden: Tensor) -> Tensor:
        """hidden: (B, T, d). Returns the likeliest ids, (B, T)."""
        return self.model.language_model.logits(hidden, self.ids).argmax(-1) + self.ids[0]

    def _choose(self, state: LayerState) -> Kept | None:
        """Asks the hook, and notes which places of the prompt it keeps."""
        assert self.hook is not None
        choice = self.hook(state)
        if choice is not None:
            batch, count = len(choice.index), state.hidden.shape[1]
            places = torch.arange(count, device=choice.index.device)[None] if self.kept is None else self.kept
            self.kept = places.expand(batch, -1).gather(1, choice.index)
            if choice.valid is not None:
                self.kept = self.kept.masked_fill(~choice.valid, -1)
        return choice

    def kept_tokens(self, batch: int, visual: int) -> list[np.ndarray | None]:
        """Of each sample of the last prompt, which of its visual tokens the hook left in: (K,) int64, ascending; None
        where it chose none.
        """
        if self.kept is None:
            return [None] * batch
        places = self.kept.cpu().numpy()
        # The first visual token stands at place 1.
        return [row[(row >= 1) & (row <= visual)] - 1 for row in places]

    def prefill(self, hidden: Tensor, positions: Tensor, valid: Tensor | None) -> Tensor:
        """The prompt of `VLA.prompt`. Returns the first token, (B, 1), or the whole answer where one pass gives it."""
        self.kept = None
        hook = None if self.hook is None else self._choose
        if self.config.decoding != "causal":
            slots = self.model.one_pass(hidden, positions, valid, hook)
            return self._best(slots) if self.model.action_head is None else self.model.action_head(slots)
        count = self.config.action_tokens
        cache = self._empty_cache(len(hidden), hidden.shape[1] + count)
        self._next = positions[:, -1:] + 1
        last = self.model.language_model.model(hidden, positions, valid=valid, cache=cache, hook=hook, last=1)
        return self._best(last)

    def decode(self, first: Tensor) -> Tensor:
        """What `prefill` returned. Returns all tokens, (B, action tokens), in the order of the action's numbers; with
        head "regression" the numbers themselves, (B, chunk, action_dim) in [-1, 1] or a little beyond.
        """
        tokens = [first]
        for done in range(self.config.action_tokens - first.shape[1]):
            hidden = self.model.language_model.model(self.model.embed(tokens[-1]), self._next + done, cache=self._cache)
            tokens.append(self._best(hidden))
        return torch.cat(tokens, 1)

    @torch.inference_mode()
    def generate(self, pixels: Tensor, texts: list[list[int]], proprio: Tensor | None = None) -> Tensor:
        """pixels: (B, cameras, 3 * towers, S, S); texts: token ids a sample; proprio: (B, numbers). See `decode`."""
        pixels = pixels.to(self.model.device, self.model.dtype)
        return self.decode(self.prefill(*self.model.prompt(self.model.visual_tokens(pixels), texts, proprio)))
