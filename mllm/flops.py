"""What a model's step costs in floating-point operations, by formula and as torch counts them while it runs.

Both count what matrix products and convolutions do, a multiplication and an addition being two; attention counts every
pair of a row and a slot, masked or not. Eigenvectors, norms and everything else element by element are left out.
Symbols: N visual tokens, T positions, S slots, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mllm.compress import ATTENTIVE, CompressConfig
from mllm.config import DecoderConfig, VLAConfig
from mllm.convvit import ConvViT
from mllm.diffusion.head import DiffusionHead
from mllm.generate import CAPACITY_STEP
from mllm.kernels import matrix_weights
from mllm.vision import patch_count
from mllm.vla import VLA


def counted(call: Callable[[], Any]) -> int:
    """Operations of one call, by torch's counter."""
    # It knows the attention kernels of GPUs only.
    cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_a_cpu}
    with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
        call()
    return counter.get_total_flops()


def _attention_on_a_cpu(query: torch.Size, key: torch.Size, value: torch.Size, *rest: object, **options: object) -> int:
    return sdpa_flop_count(query, key, value)


def visual_flops(decoder: DecoderConfig, tokens: int, compress: CompressConfig | None = None) -> int:
    """The decoder's operations on `tokens` visual tokens alone, as if there were no others: the papers' convention.

    The sum over layers of 4 n d^2 + 2 n^2 d + 3 n d m multiplications for n tokens (FastV, arXiv 2403.06764, with a
    gated MLP of m), here with grouped key-value heads too, and times 2.
    """
    kept = _kept(tokens, tokens, decoder, compress)
    return sum(_projections(decoder, n) + _outputs(decoder, n, n) for n in kept)


def step_flops(
    model: VLA, words: int, compress: CompressConfig | None = None, restricted: bool = True, passes: int = 1
) -> dict[str, int]:
    """Operations of one answer to one observation: "vision", "select", "prefill", "decode", and "step", their sum.

    words: tokens of the instruction, the first one included.  restricted, passes: see `mllm.generate.ActionDecoder`.
    """
    config, decoder = model.config, model.config.decoder
    tokens = model.vision_backbone.tokens
    proprio = model.proprio_projector
    prompt, answer = tokens + (proprio is not None) + words, config.action_tokens
    if config.decoding == "causal":
        length, last, head_rows = prompt, 1, 1
    else:
        stop = int(config.decoding == "full")
        length, last, head_rows = prompt + answer + stop, answer + 2 * stop, answer
    ids = config.action_bins if restricted else decoder.vocab_size
    head = 2 * decoder.hidden_size * ids if model.action_head is None else _weights(model.action_head)
    if isinstance(model.action_head, DiffusionHead):
        copies = max(config.diffusion.copies, 1)
        head_rows, head = model.action_head.schedule.steps, _weights(model.action_head.denoiser) // copies
    prefill = head_rows * head + (_weights(proprio) if proprio is not None else 0)
    prefill += prefill_flops(decoder, length, tokens, compress, last)
    decode = 0
    if config.decoding == "causal":
        capacity = -(-(prompt + answer) // CAPACITY_STEP) * CAPACITY_STEP
        layer = _projections(decoder, 1) + _outputs(decoder, 1, capacity)
        decode = passes * (answer - 1) * (decoder.num_hidden_layers * layer + head)
    stages = {
        "vision": _vision(model),
        "select": 0 if compress is None else selection_flops(config, tokens, length, compress),
        "prefill": prefill,
        "decode": decode,
    }
    return {**stages, "step": sum(stages.values())}


def prefill_flops(
    decoder: DecoderConfig, length: int, tokens: int, compress: CompressConfig | None = None, last: int = 1
) -> int:
    """Operations of a decoder's layers on a prompt of `length` positions, of which `tokens` are visual.

    last: positions whose outputs are asked for; see `mllm.decoder.Decoder`.
    """
    *before, rows = _kept(length, tokens, decoder, compress)
    total = sum(_projections(decoder, n) + _outputs(decoder, n, n) for n in before)
    return total + _projections(decoder, rows) + _outputs(decoder, min(last, rows), rows)


def selection_flops(config: VLAConfig, tokens: int, length: int, compress: CompressConfig) -> int:
    """Operations of choosing among the visual tokens of a prompt (with one-pass slots) of `length` positions.

    Eigenvectors (see `eigen_flops`) and sums are left out, as torch's counter knows nothing of them.
    """
    decoder, groups = config.decoder, len(config.cameras) if compress.per_camera else 1
    count, keep, total = tokens // groups, compress.keep // groups, 0
    if compress.method in ATTENTIVE:
        answers = config.action_tokens if config.decoding != "causal" else 0
        full = config.decoding == "full"
        asked = compress.query == "answer" and answers > 0
        rows = answers if asked else 1
        seen = length if full or asked else length - answers
        total += 2 * decoder.num_attention_heads * decoder.head_dim * rows * seen
    if compress.method in ("flashvla", "tokencarve"):
        products = 2 * decoder.hidden_size * count**2
        total += groups * products
        if compress.method == "tokencarve":
            reserve = min(keep + keep // 2, count)
            total += groups * 2 * keep * (reserve if reserve > keep else 0) * decoder.hidden_size
            if compress.matrix != "layer" or compress.centre or compress.normalise:
                total += groups * products
    return total


def eigen_flops(tokens: int, cameras: int, compress: CompressConfig) -> int:
    """About what the eigenvectors of the contribution cost, 9 n^3 (Golub and Van Loan, Matrix Computations, 8.3)."""
    if compress.method not in ("flashvla", "tokencarve"):
        return 0
    groups = cameras if compress.per_camera else 1
    return 9 * groups * (tokens // groups) ** 3


def _kept(length: int, tokens: int, decoder: DecoderConfig, compress: CompressConfig | None) -> list[int]:
    """Positions in every layer."""
    layers = decoder.num_hidden_layers
    if compress is None or compress.method == "none":
        return [length] * layers
    return [length] * compress.layer + [length - tokens + compress.keep] * (layers - compress.layer)


def _projections(decoder: DecoderConfig, rows: int) -> int:
    """Query, key and value of so many positions in a layer."""
    heads = decoder.num_attention_heads + 2 * decoder.num_key_value_heads
    return 2 * rows * decoder.hidden_size * heads * decoder.head_dim


def _outputs(decoder: DecoderConfig, rows: int, slots: int) -> int:
    """The rest of a layer for so many positions, each of which attends to so many slots."""
    width = decoder.num_attention_heads * decoder.head_dim
    weights = decoder.hidden_size * (width + 3 * decoder.intermediate_size)
    return 2 * rows * weights + 4 * rows * slots * width


def _weights(module: nn.Module) -> int:
    """Of a position that passes all of a module's matrices."""
    return 2 * matrix_weights(module)


def _vision(model: VLA) -> int:
    backbone, cameras = model.vision_backbone, len(model.config.cameras)
    towers = [backbone.featurizer, *([backbone.fused_featurizer] if backbone.fused_featurizer is not None else [])]
    return cameras * sum(map(_tower, towers)) + backbone.tokens * _weights(model.projector)


def _tower(tower: Any) -> int:
    """One image through a tower, as `mllm.vision.patch_features` runs it."""
    patches, width = patch_count(tower), tower.embed_dim
    if isinstance(tower, ConvViT):
        # Each convolution makes four times as many places as the one behind it.
        convolutions = [part for part in tower.stem if isinstance(part, nn.Conv2d)]
        scales = [4**behind for behind in reversed(range(len(convolutions)))]
        stem = sum(2 * patches * scale * part.weight.numel() for part, scale in zip(convolutions, scales, strict=True))
        rows, blocks = patches, list(tower.blocks)
    else:
        stem = 2 * patches * tower.patch_embed.proj.weight.numel()
        rows, blocks = patches + tower.num_prefix_tokens, list(tower.blocks)[:-1]
    return stem + sum(rows * _weights(block) + 4 * rows**2 * width for block in blocks)
