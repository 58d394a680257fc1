"""A Llama decoder and its key-value cache.

Shapes: B samples, T positions of this call, S slots of the cache, H heads, G key-value heads, D head size, d hidden.
A sample of a batch need not fill the call: `valid` says which positions exist, so padding may stand anywhere; and every
position carries its own rotary position, so what token selection leaves out leaves no mark on what it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.config import DecoderConfig
from mllm.errors import PolicyError
from mllm.kernels import Linear, attention, product, rms_norm, rows_at


@dataclass(frozen=True)
class LayerState:
    """What a token hook may look at before layer `layer`: the residual stream, and what layer - 1 made of it.

    hidden: (B, T, d).  positions: (B, T) or (1, T) rotary.  valid: (B, T), or None where nothing is padding.
    attention: (B, T, d), the output of the attention of layer - 1, after its projection.
    query: (B, H, T, D) and key: (B, G, T, D) of layer - 1, rotated; softmax(query key^T / sqrt(D)) is its attention.
    """

    layer: int
    hidden: Tensor
    positions: Tensor
    valid: Tensor | None
    attention: Tensor
    query: Tensor
    key: Tensor


@dataclass(frozen=True)
class Kept:
    """What a token hook keeps.

    index: (B, K) int64, ascending in each row, into the T positions; the last position must be kept.
    hidden: (B, K, d) in place of the kept rows, or None for these rows themselves.
    valid: (B, K), where samples keep differing numbers; None takes it from the rows kept.
    trim: cut the keys and values of the earlier layers to the kept positions too.
    merged: (B, M, 2) int64, for whoever shows it: a row that is not kept, and the kept one that has become its mean.
    """

    index: Tensor
    hidden: Tensor | None = None
    valid: Tensor | None = None
    trim: bool = True
    merged: Tensor | None = None


class TokenHook(Protocol):
    """Called before every layer but the first, in prefill only; None keeps everything."""

    def __call__(self, state: LayerState) -> Kept | None: ...


@dataclass(frozen=True)
class CacheState:
    """What a cache holds; see `KVCache`."""

    used: tuple[int, ...]
    valid: tuple[Tensor | None, ...]


class KVCache:
    """Keys and values of every layer, allocated once.

    Slots fill from the front: layer i holds `used[i]` of `capacity`, fewer where tokens were dropped. `valid[i]` is
    (B, capacity) bool, or None while every slot used is real; slots beyond `used` are never read.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (2, batch, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.batch, self.capacity = batch, capacity
        self.keys_values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.pairs = [(part[0], part[1]) for part in self.keys_values]
        self.used = [0 for _ in layers]
        self.valid: list[Tensor | None] = [None for _ in layers]

    def clear(self) -> None:
        self.used = [0] * len(self.used)
        self.valid = [None] * len(self.valid)

    @property
    def bytes(self) -> int:
        """Memory of the keys and values."""
        return sum(part.numel() * part.element_size() for part in self.keys_values)

    def resize(self, capacity: int) -> None:
        """Moves what is held to new memory of `capacity` slots, layer by layer."""
        if capacity < max(self.used):
            raise ValueError(f"{max(self.used)} slots are used: they do not fit {capacity}")
        for layer, (old, used, known) in enumerate(zip(self.keys_values, self.used, self.valid, strict=True)):
            new = self.keys_values[layer] = old.new_zeros(*old.shape[:3], capacity, old.shape[4])
            new[:, :, :, :used] = old[:, :, :, :used]
            self.pairs[layer] = (new[0], new[1])
            if known is not None:
                valid = self.valid[layer] = known.new_ones(self.batch, capacity)
                valid[:, :used] = known[:, :used]
        self.capacity = capacity

    @property
    def state(self) -> CacheState:
        return CacheState(tuple(self.used), tuple(self.valid))

    @state.setter
    def state(self, state: CacheState) -> None:
        self.used, self.valid = list(state.used), list(state.valid)

    def append(
        self, layer: int, key: Tensor, value: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """key, value: (B, G, T, D); valid: (B, T), or None where nothing is padding.

        Returns the keys and values of every slot used so far, (B, G, used, D), and which are real, (B, used) or None.
        """
        start = self.used[layer]
        end = start + key.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} positions do not fit the cache's {self.capacity} slots: make a larger one")
        keys, values = self.pairs[layer]
        keys[:, :, start:end] = key
        values[:, :, start:end] = value
        self.used[layer] = end
        known = self.valid[layer]
        if known is None and valid is not None:
            known = self.valid[layer] = valid.new_ones(valid.shape[0], self.capacity)
        if known is not None:
            known[:, start:end] = True if valid is None else valid
            known = known[:, :end] if start else valid
        return keys[:, :, :end], values[:, :, :end], known

    def keep(self, layers: range, index: Tensor, valid: Tensor | None) -> None:
        """Cuts the first slots of `layers` to index (B, K); valid: (B, K) of the slots kept, None if all are real."""
        count = index.shape[1]
        for layer in layers:
            keys_values = self.keys_values[layer]
            kind, batch, heads, _, _ = keys_values.shape
            rows = index[None, :, None].expand(kind, batch, heads, count)
            kept = rows_at(keys_values.flatten(0, 2), rows.flatten(0, 2))
            keys_values[:, :, :, :count] = kept.view(kind, batch, heads, count, -1)
            self.used[layer] = count
            self.valid[layer] = None
            if valid is not None:
                known = valid.new_ones(batch, self.capacity)
                known[:, :count] = valid
                self.valid[layer] = known


def attention_bias(
    rows: int, slots: int, valid: Tensor | None, bidirectional: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What the last `rows` positions add to their scores: 0 where they see a slot, -inf where they do not.

    valid: (B, slots) or None.  Returns (B or 1, 1, rows, slots).

    A position sees itself, earlier ones and, if it is one of the last `bidirectional`, later ones; and no padding.
    Padding sees itself, so that its rows stay finite.
    """
    mask = torch.ones(rows, slots, dtype=torch.bool, device=device).tril(slots - rows)
    if bidirectional:
        mask[-bidirectional:] = True
    if valid is not None:
        itself = torch.eye(slots, dtype=torch.bool, device=device)[slots - rows :]
        mask = (valid[:, None, None, :] | itself) & mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf).view(-1, 1, rows, slots)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Rotary grouped-query attention. `qkv_proj` stacks the rows of Hugging Face's q_proj, k_proj and v_proj."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        rows = (self.heads + 2 * self.kv_heads) * self.size
        self.qkv_proj = Linear(config.hidden_size, rows, bias=False)
        self.o_proj = Linear(self.heads * self.size, config.hidden_size, bias=False)

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, T, d), rotary: cosine and signed sine, (B or 1, 1, T, D). Returns query, key (rotated) and value."""
        batch, count, _ = x.shape
        heads = self.qkv_proj(x).view(batch, count, -1, self.size).transpose(1, 2)
        turning, value = heads.split((self.heads + self.kv_heads, self.kv_heads), 1)
        cosine, sine = (table.to(heads.dtype) for table in rotary)
        turned = torch.addcmul(turning * cosine, turning.roll(self.size // 2, -1), sine)
        query, key = turned.split((self.heads, self.kv_heads), 1)
        return query, key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
        """query: (B, H, T, D), key and value: (B, G, S, D). Returns (B, T, d)."""
        batch, _, count, _ = query.shape
        mixed = attention(query, key, value, bias, causal)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, count, -1))


class GatedMLP(nn.Module):
    """down(silu(gate) * up); `gate_up_proj` stacks the rows of Hugging Face's gate_proj and up_proj."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)


class Decoder(nn.Module):
    """Embeddings, layers and final norm: the `language_model.model` of an OpenVLA checkpoint."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # Not buffers: a model moved to bfloat16 must keep them in float32, and one made without memory must have them.
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions: (B or 1, T). Returns their cosine and signed sine, (B or 1, 1, T, D)."""
        tables = self._tables.get(positions.device)
        if tables is None:
            tables = self._tables[positions.device] = rotary_tables(self.config, positions.device)
        cosine, sine = tables
        return cosine[positions][:, None].to(dtype), sine[positions][:, None].to(dtype)

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        *,
        valid: Tensor | None = None,
        cache: KVCache | None = None,
        hook: TokenHook | None = None,
        last: int | None = None,
        bidirectional: int = 0,
    ) -> Tensor:
        """Runs every layer and the final norm.

        hidden: (B, T, d) embeddings.  positions: (B, T), or (1, T) for all samples alike.
        valid: (B, T) bool, False for padding; None if there is none.
        cache: appended to, and what it holds is attended to; None (training) keeps nothing.
        hook: may drop positions between layers; only for a cache that was empty.
        last: compute only the last so many outputs in the last layer, which nothing after it looks behind.
        bidirectional: the last so many positions see one another whatever their order; no later call should add more.
        Returns (B, last or what is left of T, d).
        """
        rotary = self.rotary(positions, hidden.dtype)
        state: tuple[Tensor, Tensor, Tensor] | None = None
        bias: Tensor | None = None
        biased: tuple[int, int, Tensor | None] | None = None
        for i, layer in enumerate(cast("list[DecoderLayer]", self.layers)):
            if hook is not None and state is not None:
                kept = hook(LayerState(i, hidden, positions, valid, *state))
                if kept is not None:
                    hidden, positions, valid = self._keep(kept, i, hidden, positions, valid, cache)
                    rotary = self.rotary(positions, hidden.dtype)
            count = rows = hidden.shape[1]
            query, key, value = layer.self_attn.project(layer.input_layernorm(hidden), rotary)
            keys, values, known = (key, value, valid) if cache is None else cache.append(i, key, value, valid)
            if last is not None and i == len(self.layers) - 1:
                rows = min(last, count)
                hidden, query = hidden[:, -rows:], query[:, :, -rows:]
            slots = keys.shape[2]
            # One row sees every slot, and whole sequences have a mask of their own inside the attention kernel.
            plain = known is None and not bidirectional
            causal = plain and rows == slots > 1
            if biased is None or biased[:2] != (rows, slots) or biased[2] is not known:
                bias, biased = None, (rows, slots, known)
                if known is not None or (rows > 1 and not causal):
                    bias = attention_bias(rows, slots, known, min(bidirectional, rows), query.dtype, hidden.device)
            attended = layer.self_attn.attend(query, keys, values, bias, causal)
            hidden = hidden + attended
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            state = (attended, query, key)
        return self.norm(hidden)

    def step(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        pairs: list[tuple[Tensor, Tensor]],
        slots: Tensor,
        bias: Tensor,
    ) -> Tensor:
        """`forward` for T more positions, with shapes that do not depend on how much the cache holds.

        hidden: (B, T, d).  rotary: see `rotary`.  pairs: `KVCache.pairs`, whose bookkeeping is left alone.
        slots: (L, T) int64, where each layer's keys and values go.
        bias: (L, B, 1, T, S), what each slot adds to its layer's scores: 0, or -inf for what is not seen.
        Returns (B, T, d).
        """
        layers = cast("list[DecoderLayer]", self.layers)
        for layer, (keys, values), places, seen in zip(layers, pairs, slots.unbind(0), bias.unbind(0), strict=True):
            query, key, value = layer.self_attn.project(layer.input_layernorm(hidden), rotary)
            keys.index_copy_(2, places, key)
            values.index_copy_(2, places, value)
            hidden = hidden + layer.self_attn.attend(query, keys, values, seen, False)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.norm(hidden)

    def _keep(
        self,
        kept: Kept,
        layer: int,
        hidden: Tensor,
        positions: Tensor,
        valid: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Applies a hook's choice before `layer`. Returns what is left of hidden, positions and valid."""
        index = kept.index
        valid = kept.valid if kept.valid is not None or valid is None else valid.gather(1, index)
        if cache is not None and kept.trim:
            cache.keep(range(layer), index, valid)
        hidden = rows_at(hidden, index) if kept.hidden is None else kept.hidden
        return hidden, positions.expand(len(index), -1).gather(1, index), valid


def rotary_tables(config: DecoderConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of every position, (max positions, D) float32, for x * cosine + roll(x, D / 2) * sine.

    Hugging Face's convention: the two halves of a head turn together, by position * theta^(-2i / D).
    """
    size = config.head_dim
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size)
    angles = torch.arange(config.max_position_embeddings, dtype=torch.float32, device="cpu")[:, None] * frequencies
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat((cosine, cosine), -1).to(device), torch.cat((-sine, sine), -1).to(device)


class LanguageModel(nn.Module):
    """The decoder and its head: the `language_model` of an OpenVLA checkpoint."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def logits(self, hidden: Tensor, ids: tuple[int, int] | None = None) -> Tensor:
        """hidden: (B, T, d). Returns (B, T, vocab), or of ids[0] to ids[1] - 1 alone, which reads fewer weights."""
        weight = self.lm_head.weight
        return product(hidden, weight if ids is None else weight[ids[0] : ids[1]])

    def best(self, hidden: Tensor, ids: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """hidden: (B, T, d). Returns the likeliest of ids[0] to ids[1] - 1, (B, T) int64, and its logit, (B, T).

        A NaN counts as the largest, so that a logit which is finite says that none was NaN.
        """
        logits = self.logits(hidden, ids)
        place = logits.argmax(-1, keepdim=True)
        return place.squeeze(-1) + ids[0], logits.gather(-1, place).squeeze(-1)


def require_finite(answer: Tensor) -> None:
    """answer: any shape, numbers that a model gives or the logits of tokens that it chose.

    Raises PolicyError: one is not finite. Then even its tokens say nothing, for the likeliest of NaNs is a token like
    any other.
    """
    if not bool((finite := answer.isfinite()).all()):
        raise PolicyError(
            f"the model's answer comes from {float(answer[~finite][0])}: its weights or inputs hold such numbers, or "
            f"{answer.dtype} cannot hold what it computes; check the checkpoint, or use float32"
        )
