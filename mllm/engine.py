"""Decoding with shapes that never change, CUDA graphs of what has such shapes, and compilation.

Launching a decoder's many small kernels takes a GPU longer than running them. There, each part of an answer is recorded
once for every shape of its inputs, and replayed as a whole; on a CPU the same functions run as they are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mllm.decoder import KVCache, LanguageModel
from mllm.errors import PolicyError
from mllm.kernels import matrix_weights
from mllm.vla import VLA

# A layer of so many weights or fewer is done with a token before a second thread has woken up.
ONE_THREAD = 1 << 20


class JacobiLoop:
    """Greedy decoding of the tokens that follow the first, on a cache that a prefill has filled.

    All of them at once: a pass foretells each token from a guess of those before it, and what it foretells is the next
    pass's guess, until nothing changes (Jacobi decoding: Santilli et al., arXiv 2305.10427; for actions PD-VLA, Song et
    al., arXiv 2503.02310). After n passes n tokens are what they would be one after the other, so that as many passes
    as tokens always do; and a pass, like a single token, reads every weight once. On the first guess depends how many
    passes an answer takes, never the answer.

    Every pass does the same to the same memory. What differs between answers is data, in static buffers (B samples,
    L layers, S slots, T = count - 1 tokens that follow):
    position: (B, 1) int64, rotary position of the first token.
    slot: (L,) int64, where each layer puts the first token's key and value.
    bias: (L, B, 1, T, S), added to the scores of each token: 0 where it sees a slot, and -inf elsewhere; a pass opens
        the slots that it fills.
    passes: that the last answer took.
    """

    def __init__(self, language: LanguageModel, cache: KVCache, ids: tuple[int, int], count: int) -> None:
        self.language, self.cache, self.ids, self.count, self.passes = language, cache, ids, count, 0
        embeddings = language.model.embed_tokens.weight
        layers, device, self.dtype = len(cache.used), embeddings.device, embeddings.dtype
        self.position = torch.zeros(cache.batch, 1, dtype=torch.int64, device=device)
        self.slot = torch.zeros(layers, dtype=torch.int64, device=device)
        self.bias = torch.zeros(layers, cache.batch, 1, count - 1, cache.capacity, dtype=self.dtype, device=device)
        self._later = torch.arange(count - 1, device=device)
        self._slots = torch.arange(cache.capacity, device=device)
        self._one_another = torch.full((count - 1, count - 1), -torch.inf, dtype=self.dtype, device=device).triu(1)
        weights = matrix_weights(language.model.layers[0])
        self._one_thread = device.type == "cpu" and weights <= ONE_THREAD
        self._foretell = Recorded(self.foretell, device.type == "cuda")

    def load(self, position: Tensor) -> None:
        """Fills the buffers by what the cache holds; position: (B or 1, 1) of the first token."""
        self.position.copy_(position.expand_as(self.position))
        self.slot.copy_(torch.tensor(self.cache.used))
        empty = (self._slots >= self.slot[:, None])[:, None]
        if any(valid is not None for valid in self.cache.valid):
            real = torch.ones(self.cache.batch, self.cache.capacity, dtype=torch.bool, device=empty.device)
            empty = empty | ~torch.stack([real if valid is None else valid for valid in self.cache.valid])
        self.bias.zero_().masked_fill_(empty[:, :, None, None], -torch.inf)

    def __call__(self, first: Tensor, guess: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """first: (B, 1) ids.  guess: (B, count) ids, an answer that this one may be like; None is the first repeated.

        Returns (B, count) ids, the first among them, and the others' logits, (B, count - 1).
        """
        later = (first if guess is None else guess[:, 1:-1]).expand(-1, self.count - 2)
        settled, self.passes = False, 0
        while not settled and self.passes < self.count - 1:
            tokens, logits = self._foretell(torch.cat((first, later), 1))
            settled, later = torch.equal(tokens[:, :-1], later), tokens[:, :-1].clone()
            self.passes += 1
        return torch.cat((first, tokens), 1), logits

    def foretell(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens: (B, T) ids. Returns what follows each of them, (B, T) ids, and its logit, (B, T)."""
        decoder = self.language.model
        with one_thread(self._one_thread):
            slots = self.slot[:, None] + self._later
            own = slots[:, None, None, None].expand(*self.bias.shape[:-1], -1)
            self.bias.scatter_(-1, own, self._one_another.expand_as(own))
            rotary = decoder.rotary(self.position + self._later, self.dtype)
            hidden = decoder.step(decoder.embed_tokens(tokens), rotary, self.cache.pairs, slots, self.bias)
            return self.language.best(hidden, self.ids)


def compile_model(model: VLA) -> None:
    """Has torch.compile fuse, in place, the towers, the projector, the decoder and its step.

    The first answer, and a first prompt of another length, then take seconds to minutes. Raises PolicyError: a CPU
    without a C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if model.device.type == "cpu" and shutil.which(compiler) is None:
        raise PolicyError(f"compile needs the C++ compiler '{compiler}': install it, name another in CXX, or leave it")
    decoder = model.language_model.model
    for module in (model.vision_backbone, model.projector, decoder):
        module.compile()
    decoder.step = torch.compile(decoder.step)  # type: ignore[method-assign]


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    threads = torch.get_num_threads()
    if not wanted or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Recorded:
    """A function of tensors and None, which must be on a GPU to be recorded: one graph for every shape of its inputs.

    The function must do the same whatever its inputs' values: no copies to the host and no shapes that depend on data.
    What it returns belongs to the graph: the next call of these shapes overwrites its tensors, and everything else is
    what the recorded call returned.
    """

    def __init__(self, function: Callable[..., Any], record: bool) -> None:
        self._function, self._record_calls = function, record
        self._pool: Any = None
        self._graphs: dict[tuple[torch.Size | None, ...], tuple[torch.cuda.CUDAGraph, list[Tensor | None], Any]] = {}

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor | None) -> Any:
        if not self._record_calls:
            return self._function(*inputs)
        key = tuple(None if value is None else value.shape for value in inputs)
        if key not in self._graphs:
            self._graphs[key] = self._record(inputs)
        graph, static, answer = self._graphs[key]
        for own, given in zip(static, inputs, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        graph.replay()
        return answer

    def _record(self, inputs: tuple[Tensor | None, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor | None], Any]:
        static = [None if value is None else value.clone() for value in inputs]
        # What kernels allocate or choose on their first runs must not be recorded.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._function(*static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Of this function's graphs only one runs at a time, and the answers of all of them stay.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            answer = self._function(*static)
        return graph, static, answer
