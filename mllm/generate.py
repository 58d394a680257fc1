"""From a prompt to action tokens: greedily in a few passes, or all in one."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mllm.compress import CompressConfig, Compressor
from mllm.decoder import CacheState, Kept, KVCache, LayerState, TokenHook, require_finite
from mllm.engine import JacobiLoop, Recorded
from mllm.vla import VLA

# A cache has a multiple of so many slots, so that prompts of similar lengths share one.
CAPACITY_STEP = 32


@dataclass(frozen=True)
class Choice:
    """What a hook has done with the prompts of B samples.

    kept: (B, K) int64, places in the prompt that it left in, ascending, -1 where a sample kept fewer; None where it
        left in all.
    merged: (B, M, 2) int64, places: one that is gone, and the one that it is part of now; None where it merged none.
    seconds: what it took.
    """

    kept: Tensor | None = None
    merged: Tensor | None = None
    seconds: float = 0.0

    def visual(self, batch: int, count: int) -> list[tuple[np.ndarray | None, np.ndarray | None]]:
        """Of each sample, `ActionStep.kept` and `ActionStep.merged`, for so many visual tokens."""
        kept: list[np.ndarray | None] = [None] * batch
        merged: list[np.ndarray | None] = [None] * batch
        if self.kept is not None:
            # The first visual token stands at place 1.
            kept = [row[(row >= 1) & (row <= count)] - 1 for row in self.kept.cpu().numpy()]
        if self.merged is not None:
            merged = list(self.merged.cpu().numpy() - 1)
        return list(zip(kept, merged, strict=True))


def compressor(model: VLA, config: CompressConfig, taught: bool = False) -> Compressor | None:
    """The token hook for prompts of `VLA.prompt`; None for method "none".

    taught: an answer stands behind the prompt of a causal model, all but its last token: `VLA.teacher_forced`.
    Raises PolicyError: see `CompressConfig.check`.
    """
    sizes, tokens = model.config, model.vision_backbone.tokens
    one_pass, full = sizes.decoding != "causal", sizes.decoding == "full"
    hook = Compressor(
        config,
        torch.arange(1, tokens + 1, device=model.device)[None],
        sizes.decoder.num_hidden_layers,
        images=len(sizes.cameras),
        slots=sizes.action_tokens if one_pass else taught * (sizes.action_tokens - 1),
        stop=int(full),
        mutual=full,
    )
    return None if config.method == "none" else hook


class ActionDecoder:
    """Decodes the action tokens of prompts; a cache serves every prompt of its number of samples that fits.

    restricted: choose among action tokens only, which reads 256 rows of the head instead of all; False lets any token
    win, as the published code does. The two differ only where the model wants to say something that is no action.
    hook: token selection in the prefill, which then is not recorded on CUDA; see `mllm.decoder` and `mllm.engine`. It
        may be changed between two answers.
    choice: what the hook did with the last prompt.
    """

    def __init__(self, model: VLA, restricted: bool = True, hook: TokenHook | None = None) -> None:
        self.model, self.config = model, model.config
        self.ids = self.config.action_ids if restricted else (0, self.config.decoder.vocab_size)
        self.visual_tokens = Recorded(model.visual_tokens, model.device.type == "cuda")
        self.hook = hook

    @property
    def hook(self) -> TokenHook | None:
        return self._hook

    @hook.setter
    def hook(self, hook: TokenHook | None) -> None:
        self._hook, self.choice = hook, Choice()
        # What a hook keeps may depend on what it sees, and its arithmetic may need the host.
        self._records_prefill = self.model.device.type == "cuda" and hook is None
        self._one_pass = Recorded(self._answer, self._records_prefill)
        self._loops: dict[int, tuple[JacobiLoop, Recorded]] = {}
        self._loop: JacobiLoop | None = None
        self._grounds: tuple[Tensor, ...] = ()

    @property
    def passes(self) -> int:
        """What the last answer took after the prefill; see `mllm.engine.JacobiLoop`."""
        return 0 if self._loop is None else self._loop.passes

    def _room(self, batch: int, slots: int) -> tuple[JacobiLoop, Recorded]:
        """A loop whose cache has so much room, and the prefill that fills it."""
        known = self._loops.get(batch)
        if known is None or known[0].cache.capacity < slots:
            capacity = -(-slots // CAPACITY_STEP) * CAPACITY_STEP
            cache = KVCache(self.config.decoder, batch, capacity, self.model.dtype, self.model.device)
            loop = JacobiLoop(self.model.language_model, cache, self.ids, self.config.action_tokens)
            known = self._loops[batch] = loop, Recorded(partial(self._fill, cache), self._records_prefill)
        return known

    def _choose(self, state: LayerState) -> Kept | None:
        """Asks the hook, and notes what it does with the places of the prompt."""
        assert self._hook is not None
        before, started = self.choice, self._clock()
        kept = self._hook(state)
        seconds = before.seconds + self._clock() - started
        if kept is None:
            self.choice = replace(before, seconds=seconds)
            return None
        batch, count = len(kept.index), state.hidden.shape[1]
        places = torch.arange(count, device=kept.index.device)[None] if before.kept is None else before.kept
        places, merged = places.expand(batch, -1), before.merged
        if kept.merged is not None:
            pairs = places.gather(1, kept.merged.flatten(1)).view_as(kept.merged)
            merged = pairs if merged is None else torch.cat((merged, pairs), 1)
        left = places.gather(1, kept.index)
        if kept.valid is not None:
            left = left.masked_fill(~kept.valid, -1)
        self.choice = Choice(left, merged, seconds)
        return kept

    def _clock(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    @torch.inference_mode()
    def prefill(self, hidden: Tensor, positions: Tensor, valid: Tensor | None) -> Tensor:
        """The prompt of `VLA.prompt`. Returns the first token, (B, 1), or the whole answer where one pass gives it."""
        if self.config.decoding != "causal":
            answer, logits, self.choice = self._one_pass(hidden, positions, valid)
            self._grounds = (logits,)
            return answer
        self._loop, fill = self._room(len(hidden), hidden.shape[1] + self.config.action_tokens)
        first, logits, self.choice, self._loop.cache.state = fill(hidden, positions, valid)
        self._grounds = (logits,)
        self._loop.load(positions[:, -1:] + 1)
        return first

    def _answer(self, hidden: Tensor, positions: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Choice]:
        """Returns the answer of one pass, its tokens' logits (of another head the answer itself), and `choice`."""
        self.choice = Choice()
        slots = self.model.one_pass(hidden, positions, valid, None if self.hook is None else self._choose)
        if self.model.action_head is None:
            return *self.model.language_model.best(slots, self.ids), self.choice
        answer = self.model.action_head(slots)
        return answer, answer, self.choice

    def _fill(
        self, cache: KVCache, hidden: Tensor, positions: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Choice, CacheState]:
        """Returns the first token, its logit, `choice`, and what the cache holds then."""
        self.choice = Choice()
        cache.clear()
        language, hook = self.model.language_model, None if self.hook is None else self._choose
        last = language.model(hidden, positions, valid=valid, cache=cache, hook=hook, last=1)
        return *language.best(last, self.ids), self.choice, cache.state

    @torch.inference_mode()
    def decode(self, first: Tensor, guess: Tensor | None = None) -> Tensor:
        """first: what `prefill` returned.  guess: an answer that this one may be like; see `mllm.engine.JacobiLoop`.

        Returns all tokens, (B, action tokens), in the order of the action's numbers; with another head than "tokens"
        the numbers themselves, (B, chunk, action_dim) in [-1, 1] or a little beyond.
        """
        if first.shape[1] == self.config.action_tokens or self._loop is None:
            return first
        tokens, logits = self._loop(first, guess)
        self._grounds = (self._grounds[0], logits)
        return tokens

    def check(self) -> None:
        """Raises PolicyError: the last answer comes from numbers that are not finite."""
        for grounds in self._grounds:
            require_finite(grounds)

    @torch.inference_mode()
    def generate(self, pixels: Tensor, texts: list[list[int]], proprio: Tensor | None = None) -> Tensor:
        """pixels: (B, cameras, 3 * towers, S, S); texts: token ids a sample; proprio: (B, numbers). See `decode`."""
        pixels = pixels.to(self.model.device, self.model.dtype)
        answer = self.decode(self.prefill(*self.model.prompt(self.visual_tokens(pixels), texts, proprio)))
        self.check()
        return answer
