"""Which visual tokens a decoder goes on with: FlashVLA, TokenCarve and what users compare them with.

FlashVLA: arXiv 2505.21200. TokenCarve: arXiv 2503.10501 and its public code. FastV: arXiv 2403.06764. Kept tokens stand
in their order at their original positions; everything that is no visual token stays.
Shapes: B samples, N visual tokens, K kept, d hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mllm.config import changed, check_choice, check_flags, check_numbers, check_sizes
from mllm.contribution import contribution, gram
from mllm.decoder import Kept, LayerState
from mllm.errors import PolicyError
from mllm.kernels import rows_at
from mllm.selection import Selection, carve, draw, points, spread, top

METHODS = ("none", "flashvla", "tokencarve", "fastv", "random", "uniform")
ATTENTIVE = ("tokencarve", "fastv")
MATRICES = ("layer", "attention")
QUERIES = ("prompt", "answer")


@dataclass(frozen=True)
class CompressConfig:
    """How many visual tokens a decoder keeps, and by what.

    method: "flashvla" keeps those of the highest information contribution; "tokencarve" ranks by contribution and
        attention together, and merges some of what it drops into what it keeps; "fastv" keeps those that the query
        attends to most; "random" the same drawn places in every frame, so that an answer depends on nothing before it;
        "uniform" evenly spaced ones; "none" all.
    keep: visual tokens that stay, of all cameras together.
    layer: the layers that see all tokens; the papers' 2.
    matrix: what is scored, the output of the last of these layers ("layer", the authors' code) or of its attention
        ("attention", the papers' word).
    energy, centre, normalise: see `mllm.contribution`.
    per_camera: every camera's tokens are scored by themselves, and each keeps an equal part; our choice.
    attention_weight: of attention's ranks in "tokencarve", 0.5 in the authors' code; contribution has the rest.
    query: whose attention counts, of the last token of the prompt ("prompt", the authors' code), or, where an answer is
        given in one pass, of all its slots ("answer", our choice).
    trim: cut the keys and values of the earlier layers to the kept tokens too, as the authors' code does. Only an
        answer's later tokens notice, where they are given one by one; a policy that was trained for fewer tokens wants
        these layers whole (`mllm.training.thinning`).
    seed: of "random".
    """

    method: str = "none"
    keep: int = 80
    layer: int = 2
    matrix: str = "layer"
    energy: float = 1.0
    centre: bool = False
    normalise: bool = False
    per_camera: bool = False
    attention_weight: float = 0.5
    query: str = "prompt"
    trim: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self, {"method": METHODS, "matrix": MATRICES, "query": QUERIES})
        check_sizes(self, {"keep": (1, 1 << 16), "layer": (1, 255), "seed": (0, (1 << 63) - 1)})
        check_numbers(self, {"energy": (1e-6, 1), "attention_weight": (0, 1)})
        check_flags(self, ("centre", "normalise", "per_camera", "trim"))

    @classmethod
    def parse(
        cls,
        value: str | Mapping[str, Any] | CompressConfig,
        keep: int | None = None,
        rest: CompressConfig | None = None,
    ) -> CompressConfig:
        """From a policy's options: a method, or fields; see `mllm.config.changed`. What is not named is that of `rest`.

        keep: has a place of its own among the options.  Raises PolicyError.
        """
        chosen = changed(rest or cls(), value, "method", "compress")
        return chosen if keep is None else replace(chosen, keep=keep)

    def check(self, tokens: int, images: int, layers: int) -> None:
        """Raises PolicyError unless a decoder of so many layers can keep so few of so many tokens of so many images."""
        if self.method == "none":
            return
        if self.keep > tokens:
            raise PolicyError(f"CompressConfig.keep is {self.keep}: there are {tokens} visual tokens; keep 1 to that")
        if self.layer >= layers:
            raise PolicyError(
                f"CompressConfig.layer is {self.layer}: the decoder has {layers} layers; choose 1 to {layers - 1}"
            )
        if self.per_camera and (self.keep % images or tokens % images):
            raise PolicyError(
                f"CompressConfig.keep is {self.keep}: {images} cameras with {tokens} tokens cannot have equal parts of "
                f"it; keep a multiple of {images}, or set per_camera to false"
            )


def select(
    config: CompressConfig, tokens: Tensor, attention: Tensor | None = None, scored: Tensor | None = None
) -> Selection:
    """What every method but "none" keeps of `config.keep`.

    tokens: (B, N, d).  scored: (B, N, d), None means tokens.  attention: (B, N), which the methods of `ATTENTIVE` need.
    """
    batch, count, _ = tokens.shape
    if config.method == "none" or (config.method in ATTENTIVE and attention is None):
        given = "none" if attention is None else "a row"
        raise ValueError(f"nothing can be selected by method '{config.method}' with {given} of attention")
    if config.method == "uniform":
        return Selection(spread(count, config.keep, tokens.device).expand(batch, -1))
    if config.method == "random":
        return Selection(draw(count, config.keep, config.seed, tokens.device).expand(batch, -1))
    if config.method == "fastv" and attention is not None:
        return Selection(top(attention, config.keep))
    # An order has no gradient: where there is one, it is that of the tokens that stay.
    rest = tokens.detach()
    products = gram(rest if scored is None else scored.detach(), config.centre, config.normalise)
    scores = contribution(products, config.energy)
    if config.method == "flashvla" or attention is None:
        return Selection(top(scores, config.keep))
    by_attention, by_score = points(torch.cat((attention, scores))).chunk(2)
    total = config.attention_weight * by_attention + (1 - config.attention_weight) * by_score
    plain = scored is None and not config.centre and not config.normalise
    return carve(tokens, products if plain else gram(rest), total, config.keep)


def attention_of(state: LayerState, rows: slice, seen: int) -> Tensor:
    """What some positions attend to in the layer before, of the first `seen` positions; mean over heads and `rows`.

    Computed for these rows alone. Returns (B, seen) float32.
    """
    query, key = state.query[:, :, rows].float(), state.key[:, :, :seen].float()
    batch, heads, count, size = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, size)
    scores = (grouped @ key.mT / size**0.5).view(batch, heads, count, seen)
    if state.valid is not None:
        scores = scores.masked_fill(~state.valid[:, None, None, :seen], -torch.inf)
    return scores.softmax(-1).mean((1, 2))


class Compressor:
    """The decoder's token hook of a `CompressConfig`, for prompts of one layout.

    places: (B or 1, N) int64, where the visual tokens stand, ascending.  layers: of the decoder.
    images: cameras, with N / images tokens each.
    slots: positions behind the prompt that give an answer in one pass, and behind them `stop` more.
    mutual: every position sees every other; False: the prompt is causal, and slots see all.
    Raises PolicyError: see `CompressConfig.check`.
    """

    def __init__(
        self,
        config: CompressConfig,
        places: Tensor,
        layers: int,
        images: int = 1,
        slots: int = 0,
        stop: int = 0,
        mutual: bool = False,
    ) -> None:
        config.check(places.shape[1], images, layers)
        self.config, self.places = config, places
        self.slots, self.stop, self.mutual = slots, stop, mutual
        self.groups = images if config.per_camera else 1
        self._known_others: dict[int, Tensor] = {}

    def __call__(self, state: LayerState) -> Kept | None:
        if state.layer != self.config.layer or self.config.method == "none":
            return None
        batch, count, _ = state.hidden.shape
        places = self.places.expand(batch, -1)
        selection = self._select(state, places)
        kept = places.gather(1, selection.kept)
        others = self._others(count).expand(batch, -1)
        index, order = torch.cat((others, kept), 1).sort(-1)
        hidden = merged = None
        if selection.tokens is not None:
            hidden = rows_at(torch.cat((rows_at(state.hidden, others), selection.tokens), 1), order)
        if selection.merged is not None:
            merged = places.gather(1, selection.merged.flatten(1)).view_as(selection.merged)
        return Kept(index, hidden, trim=self.config.trim, merged=merged)

    def _select(self, state: LayerState, places: Tensor) -> Selection:
        """`select` on every sample, or on every image of every sample."""
        config, (batch, count), groups = self.config, places.shape, self.groups

        def tokens_of(hidden: Tensor) -> Tensor:
            return rows_at(hidden, places).view(batch * groups, count // groups, -1)

        attention = None
        if config.method in ATTENTIVE:
            row = attention_of(state, *self._query(state.hidden.shape[1]))
            attention = row.gather(1, places).view(-1, count // groups)
        scored = tokens_of(state.attention) if config.matrix == "attention" else None
        each = replace(config, keep=config.keep // groups)
        selection = select(each, tokens_of(state.hidden), attention, scored)
        first = torch.arange(groups, device=places.device).view(1, groups, 1) * (count // groups)
        merged, tokens = selection.merged, selection.tokens
        if merged is not None:
            merged = (merged.view(batch, groups, -1) + first).view(batch, -1, 2)
        kept = (selection.kept.reshape(batch, groups, -1) + first).view(batch, -1)
        return Selection(kept, merged, None if tokens is None else tokens.view(batch, config.keep, -1))

    def _others(self, count: int) -> Tensor:
        """The places among so many where no visual token stands, (B or 1, count - N), ascending."""
        if count not in self._known_others:
            other = torch.ones(len(self.places), count, dtype=torch.bool, device=self.places.device)
            other.scatter_(1, self.places, False)
            first = other.byte().argsort(dim=1, descending=True, stable=True)
            self._known_others[count] = first[:, : count - self.places.shape[1]]
        return self._known_others[count]

    def _query(self, count: int) -> tuple[slice, int]:
        """Rows whose attention counts, of so many positions, and how many of the first positions they see."""
        behind = self.slots + self.stop
        if self.config.query == "answer" and self.slots:
            # Where all see all, a slot is read one position before it; see `VLA.one_pass`.
            first = count - behind - self.mutual
            return slice(first, first + self.slots), count
        last = count - behind
        return slice(last - 1, last), count if self.mutual else last
