"""An action head that draws a chunk from noise, given the hidden states of the chunk's slots (after Diffusion Policy,
Chi et al., arXiv 2303.04137).
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from mllm.config import DiffusionConfig
from mllm.diffusion.denoiser import Denoiser, DenoiserConfig
from mllm.diffusion.schedule import Schedule
from quant.talora import Copies, Deployed

# Levels of noise that each sample of a batch is trained on: a pass of the backbone costs far more than one of the head.
DRAWS = 4
# Of an action's numbers, which are labels in [-1, 1].
LIMIT = 1.0


class DiffusionHead(nn.Module):
    """All numbers of a chunk together, by DDIM from one noise, so that equal observations have equal answers (our
    choice; it is kept with the weights).
    """

    noise: Tensor

    def __init__(self, hidden: int, chunk: int, numbers: int, config: DiffusionConfig) -> None:
        super().__init__()
        self.schedule = Schedule(config.times, config.steps, LIMIT)
        row = chunk * numbers
        self.denoiser = Denoiser(DenoiserConfig(row, config.width, config.depth, condition=chunk * hidden))
        if config.copies:
            for name, layer in list(self.denoiser.named_modules()):
                if isinstance(layer, nn.Linear):
                    self.denoiser.set_submodule(name, Copies([copy.deepcopy(layer) for _ in range(config.copies)]))
        self.deployed = Deployed(self.denoiser, config.table)
        self.register_buffer("noise", torch.randn(chunk, numbers, generator=torch.Generator().manual_seed(0)))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (B, chunk, hidden). Returns (B, chunk, numbers)."""
        condition = hidden.flatten(1)
        drawn = self.schedule.sample(
            lambda step, x: self.deployed.at(step)(x, self.level(step, len(x)), condition),
            self.noise.to(hidden.dtype).flatten().expand(len(hidden), -1),
        )
        return drawn.unflatten(1, self.noise.shape)

    def with_weights(self, deployed: Deployed) -> DiffusionHead:
        """A head with another denoiser and table, and everything else of this one."""
        head = copy.copy(self)
        head._modules = self._modules.copy()
        head.denoiser, head.deployed = deployed.model, deployed  # type: ignore[assignment]
        return head

    def level(self, step: int, rows: int) -> Tensor:
        """(rows,): the level of noise in a step of the sampler."""
        return torch.full((rows,), self.schedule.visited[step], device=self.noise.device)

    def loss(self, hidden: Tensor, actions: Tensor, generator: np.random.Generator) -> Tensor:
        """hidden: (B, chunk, hidden); actions: (B, chunk, numbers). Returns (B, chunk, numbers): the squared error of
        the noise foretold, mean over `DRAWS` levels and noises of each sample.
        """
        batch, shape = len(actions), (DRAWS * len(actions), *self.noise.shape)
        times = torch.from_numpy(generator.integers(self.schedule.times, size=shape[0])).to(hidden.device)
        noise = torch.from_numpy(generator.standard_normal(shape, np.float32)).to(hidden.device)
        noised = self.schedule.noised(actions.repeat(DRAWS, 1, 1), times, noise)
        found = self.denoiser(noised.flatten(1), times, hidden.flatten(1).repeat(DRAWS, 1)).float()
        return (found.view(shape) - noise).square().view(DRAWS, batch, *self.noise.shape).mean(0)
