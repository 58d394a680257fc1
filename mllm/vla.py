"""The vision-language-action model: images and words in, logits of action tokens out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.config import VLAConfig
from mllm.decoder import LanguageModel, TokenHook
from mllm.diffusion.head import DiffusionHead
from mllm.errors import PolicyError
from mllm.vision import Projector, VisionBackbone

# Llama's end of text, which OpenVLA-OFT puts behind the action slots.
STOP = 2


class ProprioProjector(nn.Module):
    """Proprioception to one embedding, as OpenVLA-OFT's (Kim et al., arXiv 2502.19645)."""

    def __init__(self, numbers: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(numbers, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, proprio: Tensor) -> Tensor:
        """proprio: (B, numbers) in [-1, 1]. Returns (B, 1, hidden)."""
        return self.fc2(F.gelu(self.fc1(proprio)))[:, None]


class ActionHead(nn.Module):
    """The hidden state of an action's slot to the action's numbers; trained by their L1 distance, as OpenVLA-OFT's."""

    def __init__(self, hidden: int, numbers: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, hidden)
        self.fc2 = nn.Linear(hidden, numbers)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (B, T, hidden). Returns (B, T, numbers)."""
        return self.fc2(F.gelu(self.fc1(hidden)))


class VLA(nn.Module):
    """OpenVLA's architecture; `state_dict` carries its published names (see `mllm.tensor_names`).

    A prompt is [BOS, visual tokens, proprioception if any, the other text tokens]: OpenVLA puts the image behind the
    first token, and OpenVLA-OFT proprioception behind the image.
    """

    def __init__(self, config: VLAConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_backbone = VisionBackbone(config)
        self.projector = Projector(len(config.towers), self.vision_backbone.width, config.decoder.hidden_size)
        self.language_model = LanguageModel(config.decoder)
        hidden, numbers = config.decoder.hidden_size, config.proprio_statistics
        self.proprio_projector = ProprioProjector(len(numbers.low), hidden) if numbers is not None else None
        self.action_slots = None if config.head == "tokens" else nn.Parameter(torch.empty(config.chunk, hidden))
        self.action_head: ActionHead | DiffusionHead | None = None
        if config.head == "regression":
            self.action_head = ActionHead(hidden, config.action_dim)
        elif config.head == "diffusion":
            self.action_head = DiffusionHead(hidden, config.chunk, config.action_dim, config.diffusion)

    @property
    def device(self) -> torch.device:
        return self.language_model.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.embed_tokens.weight.dtype

    def visual_tokens(self, pixels: Tensor) -> Tensor:
        """pixels: (B, cameras, 3 * towers, S, S) as `mllm.preprocess` makes them. Returns (B, N, hidden)."""
        return self.projector(self.vision_backbone(pixels))

    def check_room(self, words: int, others: int | None = None) -> None:
        """Raises PolicyError unless so many words fit beside the others: visual tokens and proprioception, or those
        that all cameras and sensors make.
        """
        if others is None:
            others = self.vision_backbone.tokens + (self.proprio_projector is not None)
        answer = self.config.action_tokens + (self.config.decoding == "full")  # with its stop token
        room = self.config.decoder.max_position_embeddings - answer
        if words + others > room:
            raise PolicyError(
                f"the prompt has {words} words and {others} visual tokens: the model has room for {room}; "
                "shorten the instruction"
            )

    def embed(self, ids: Tensor) -> Tensor:
        """ids: (B, T) int64. Returns (B, T, hidden)."""
        return self.language_model.model.embed_tokens(ids)

    def prompt(
        self, visual: Tensor, texts: Sequence[Sequence[int]], proprio: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """visual: (B, N, hidden); texts: a list of token ids a sample, beginning with BOS; proprio: (B, numbers).

        Returns hidden (B, P, hidden), positions (B or 1, P) and valid (B, P) or None. Shorter texts are padded between
        the image and the words, so that visual tokens stand at 1 to N and the last word at P - 1 in every sample.
        Raises PolicyError: no text, or more positions than the model has.
        """
        if self.proprio_projector is not None:
            if proprio is None:
                raise PolicyError(f"the model takes proprioception ({', '.join(self.config.proprio)}): none was given")
            visual = torch.cat((visual, self.proprio_projector(proprio)), 1)
        batch, count, _ = visual.shape
        lengths = [len(text) for text in texts]
        if len(texts) != batch or min(lengths, default=0) < 1:
            raise PolicyError(f"{batch} images came with {len(texts)} texts of {lengths} tokens: one for each, of 1 up")
        longest = max(lengths)
        self.check_room(longest, count)
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

    def one_pass(
        self, hidden: Tensor, positions: Tensor, valid: Tensor | None, hook: TokenHook | None = None
    ) -> Tensor:
        """The prompt with a slot for every part of the answer behind it, in one pass (OpenVLA-OFT, arXiv 2502.19645).

        "full" is OFT's: slots are empty, every position sees every other, a stop token ends the slots, and as in
        training a slot's token is read one position before it. "slots" leaves the prompt causal and reads each slot
        at its own place. Returns the slots' hidden states, (B, action tokens, hidden).
        """
        count, full = self.config.action_tokens, self.config.decoding == "full"
        batch, prompt, size = hidden.shape
        if self.action_slots is not None:
            slots = self.action_slots.to(hidden.dtype).expand(batch, -1, -1)
        else:
            slots = hidden.new_zeros(batch, count, size)
        if full:
            slots = torch.cat((slots, self.embed(torch.full((batch, 1), STOP, device=hidden.device))), 1)
        added = slots.shape[1]
        positions = torch.cat((positions, positions[:, -1:] + 1 + torch.arange(added, device=hidden.device)), 1)
        if valid is not None:
            valid = torch.cat((valid, valid.new_ones(batch, added)), 1)
        answer = self.language_model.model(
            torch.cat((hidden, slots), 1),
            positions,
            valid=valid,
            hook=hook,
            last=count + 2 if full else count,
            bidirectional=prompt + added if full else count,
        )
        return answer[:, :count]

    def teacher_forced(
        self,
        hidden: Tensor,
        positions: Tensor,
        valid: Tensor | None,
        tokens: Tensor,
        hook: TokenHook | None = None,
    ) -> Tensor:
        """The prompt with all tokens of an answer but the last behind it, as training wants it.

        tokens: (B, action tokens) ids. Returns the hidden states that foretell them, (B, action tokens, hidden).
        """
        batch, count = tokens.shape
        positions = torch.cat((positions, positions[:, -1:] + torch.arange(1, count, device=hidden.device)), 1)
        if valid is not None:
            valid = torch.cat((valid, valid.new_ones(batch, count - 1)), 1)
        hidden = torch.cat((hidden, self.embed(tokens[:, :-1]).to(hidden.dtype)), 1)
        return self.language_model.model(hidden, positions, valid=valid, hook=hook, last=count)


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
