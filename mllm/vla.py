"""The vision-language-action model: images and words in, logits of action tokens out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mllm.config import VLAConfig
from mllm.decoder import LanguageModel
from mllm.errors import PolicyError
from mllm.vision import Projector, VisionBackbone


class VLA(nn.Module):
    """OpenVLA's architecture; `state_dict` carries its published names (see `mllm.tensor_names`).

    A prompt is [BOS, visual tokens, the other text tokens]: OpenVLA puts the image behind the first token.
    """

    def __init__(self, config: VLAConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_backbone = VisionBackbone(config)
        self.projector = Projector(len(config.towers), self.vision_backbone.width, config.decoder.hidden_size)
        self.language_model = LanguageModel(config.decoder)

    @property
    def device(self) -> torch.device:
        return self.language_model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.lm_head.weight.dtype

    def visual_tokens(self, pixels: Tensor) -> Tensor:
        """pixels: (B, cameras, 3 * towers, S, S) as `mllm.preprocess` makes them. Returns (B, N, hidden)."""
        return self.projector(self.vision_backbone(pixels))

    def embed(self, ids: Tensor) -> Tensor:
        """ids: (B, T) int64. Returns (B, T, hidden)."""
        return self.language_model.model.embed_tokens(ids)

    def prompt(self, visual: Tensor, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor | None]:
        """visual: (B, N, hidden); texts: a list of token ids a sample, beginning with BOS.

        Returns hidden (B, P, hidden), positions (B or 1, P) and valid (B, P) or None. Shorter texts are padded between
        the image and the words, so that visual tokens stand at 1 to N and the last word at P - 1 in every sample.
        Raises PolicyError: no text, or more positions than the model has.
        """
        batch, count, _ = visual.shape
        lengths = [len(text) for text in texts]
        if len(texts) != batch or min(lengths, default=0) < 1:
            raise PolicyError(f"{batch} images came with {len(texts)} texts of {lengths} tokens: one for each, of 1 up")
        longest = max(lengths)
        room = self.config.decoder.max_position_embeddings - self.config.action_tokens
        if longest + count > room:
            raise PolicyError(
                f"the prompt has {longest} words and {count} visual tokens: the model has room for {room}; "
                "shorten the instruction"
            )
        padded = [[text[0], *[0] * (longest - len(text)), *text[1:]] for text in texts]
        words = self.embed(torch.tensor(padded, device=visual.device))
        hidden = torch.cat((words[:, :1], visual, words[:, 1:]), 1)
        positions = torch.arange(longest + count, device=visual.device)[None]
        if min(lengths) == longest:
            return hidden, positions, None
        missing = torch.tensor([longest - length for length in lengths], device=visual.device)[:, None]
        behind = positions > count
        valid = ~behind | (positions > count + missing)
        return hidden, torch.where(behind, (positions - missing).clamp(min=0), positions), valid


@torch.no_grad()
def init_random(model: VLA, seed: int) -> VLA:
    """Fills every weight by `seed`, alike on every device: normal with a spread of 1 / sqrt(inputs), norms at 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(1.0 if name.endswith(("weight", "gamma")) else 0.0)
            continue
        inputs = parameter.shape[1:].numel() if parameter.dim() != 3 else parameter.shape[-1]
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(inputs))
    return model
