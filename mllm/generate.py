"""From a prompt to action tokens: greedily one by one, or all in one pass."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from mllm.decoder import CacheState, Kept, KVCache, LayerState, TokenHook
from mllm.engine import Recorded, TokenLoop
from mllm.vla import VLA

# A cache has a multiple of so many slots, so that prompts of similar lengths share one.
CAPACITY_STEP = 32


class ActionDecoder:
    """Decodes the action tokens of prompts; a cache serves every prompt of its number of samples that fits.

    restricted: choose among action tokens only, which reads 256 rows of the head instead of all; False lets any token
    win, as the published code does. The two differ only where the model wants to say something that is no action.
    hook: token selection in the prefill, which then is not recorded on CUDA; see `mllm.decoder` and `mllm.engine`.
    kept: (B, K) int64, places in the last prompt that the hook left in, ascending, -1 where a sample kept fewer; None
        where it left in all.
    """

    def __init__(self, model: VLA, restricted: bool = True, hook: TokenHook | None = None) -> None:
        self.model, self.config = model, model.config
        self.ids = self.config.action_ids if restricted else (0, self.config.decoder.vocab_size)
        self.hook = hook
        self.kept: Tensor | None = None
        on_gpu = model.device.type == "cuda"
        self.visual_tokens = Recorded(model.visual_tokens, on_gpu)
        # What a hook keeps may depend on what it sees, and its arithmetic may need the host.
        self._records_prefill = on_gpu and hook is None
        self._one_pass = Recorded(self._answer, self._records_prefill)
        self._loops: dict[int, tuple[TokenLoop, Recorded]] = {}
        self._loop: TokenLoop | None = None

    def _room(self, batch: int, slots: int) -> tuple[TokenLoop, Recorded]:
        """A loop whose cache has so much room, and the prefill that fills it."""
        known = self._loops.get(batch)
        if known is None or known[0].cache.capacity < slots:
            capacity = -(-slots // CAPACITY_STEP) * CAPACITY_STEP
            cache = KVCache(self.config.decoder, batch, capacity, self.model.dtype, self.model.device)
            loop = TokenLoop(self.model, cache, self.ids, self.config.action_tokens)
            known = self._loops[batch] = loop, Recorded(partial(self._fill, cache), self._records_prefill)
        return known

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

    @torch.inference_mode()
    def prefill(self, hidden: Tensor, positions: Tensor, valid: Tensor | None) -> Tensor:
        """The prompt of `VLA.prompt`. Returns the first token, (B, 1), or the whole answer where one pass gives it."""
        if self.config.decoding != "causal":
            answer, self.kept = self._one_pass(hidden, positions, valid)
            return answer
        self._loop, fill = self._room(len(hidden), hidden.shape[1] + self.config.action_tokens)
        first, self.kept, self._loop.cache.state = fill(hidden, positions, valid)
        self._loop.load(positions[:, -1:] + 1)
        return first

    def _answer(self, hidden: Tensor, positions: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns the answer of one pass, and `kept`."""
        self.kept = None
        slots = self.model.one_pass(hidden, positions, valid, None if self.hook is None else self._choose)
        head = self.model.action_head
        return self.model.language_model.best(slots, self.ids) if head is None else head(slots), self.kept

    def _fill(
        self, cache: KVCache, hidden: Tensor, positions: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor | None, CacheState]:
        """Returns the first token, `kept`, and what the cache holds then."""
        self.kept = None
        cache.clear()
        language, hook = self.model.language_model, None if self.hook is None else self._choose
        last = language.model(hidden, positions, valid=valid, cache=cache, hook=hook, last=1)
        return language.best(last, self.ids), self.kept, cache.state

    @torch.inference_mode()
    def decode(self, first: Tensor) -> Tensor:
        """What `prefill` returned. Returns all tokens, (B, action tokens), in the order of the action's numbers; with
        head "regression" the numbers themselves, (B, chunk, action_dim) in [-1, 1] or a little beyond.
        """
        return first if first.shape[1] == self.config.action_tokens or self._loop is None else self._loop(first)

    @torch.inference_mode()
    def generate(self, pixels: Tensor, texts: list[list[int]], proprio: Tensor | None = None) -> Tensor:
        """pixels: (B, cameras, 3 * towers, S, S); texts: token ids a sample; proprio: (B, numbers). See `decode`."""
        pixels = pixels.to(self.model.device, self.model.dtype)
        return self.decode(self.prefill(*self.model.prompt(self.visual_tokens(pixels), texts, proprio)))
