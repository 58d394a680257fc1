"""Training a denoiser to foretell the noise (DDPM, Ho et al., arXiv 2006.11239)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mllm.config import check_numbers, check_sizes
from mllm.diffusion.denoiser import Denoiser, DenoiserConfig
from mllm.diffusion.schedule import Schedule


@dataclass(frozen=True)
class FitConfig:
    """steps: of AdamW.  batch: rows a step.  rate: falls to 0 by half a cosine.  average: decay of the averaged
    weights, which are the ones that count.  seed: of the first weights and of everything drawn.
    """

    steps: int = 4000
    batch: int = 256
    rate: float = 2e-3
    average: float = 0.998
    seed: int = 0

    def __post_init__(self) -> None:
        check_sizes(self, {"steps": (1, 10**8), "batch": (1, 1 << 20), "seed": (0, 2**32 - 1)})
        check_numbers(self, {"rate": (0, 1), "average": (0, 0.999999)})


def fit(model: Denoiser, x: Tensor, schedule: Schedule, config: FitConfig, condition: Tensor | None = None) -> Denoiser:
    """x: (n, numbers), rows to learn from; condition: (n, condition) of the same rows. Returns the averaged model.

    model: its weights are made anew, by the seed.
    """
    generator = torch.Generator().manual_seed(config.seed)
    init_linear(model, generator)
    average = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), config.rate, betas=(0.9, 0.99), weight_decay=0.01)
    course = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps)
    for step in range(config.steps):
        rows = torch.randint(len(x), (config.batch,), generator=generator)
        times = torch.randint(schedule.times, (config.batch,), generator=generator)
        noise = torch.randn(config.batch, x.shape[1], generator=generator)
        found = model(schedule.noised(x[rows], times, noise), times, None if condition is None else condition[rows])
        optimiser.zero_grad(set_to_none=True)
        (found - noise).square().mean().backward()
        optimiser.step()
        course.step()
        decay = min(config.average, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    return average


def fitted(
    path: Path,
    config: DenoiserConfig,
    x: Tensor,
    schedule: Schedule,
    how: FitConfig,
    seed: int,
    condition: Tensor | None = None,
) -> Denoiser:
    """The denoiser that `path` holds, or after `fit` by the seed, kept there. Not to be trained further."""
    model = Denoiser(config)
    if path.is_file():
        model.load_state_dict(load_file(path))
    else:
        model = fit(model, x, schedule, replace(how, seed=seed), condition)
        part = path.with_suffix(".part")
        save_file(model.state_dict(), part)
        part.replace(path)
    return model.requires_grad_(False)


@torch.no_grad()
def init_linear(model: nn.Module, generator: torch.Generator) -> None:
    """Every linear layer at random by the generator: normal with a spread of 1 / sqrt(inputs), and no bias."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            drawn = torch.randn(layer.weight.shape, generator=generator)
            layer.weight.copy_(drawn / math.sqrt(layer.in_features))
            layer.bias.zero_()
