"""Muon for the matrices inside layers, AdamW for everything else, and the course of their rates."""

from __future__ import annotations

import math

import torch
from torch import nn

from mllm.training.config import TrainConfig
from mllm.training.muon import Muon

# Modules whose two-dimensional weights turn one hidden state into another.
HIDDEN = ("blocks.", "layers.", "projector.")


def make_optimisers(learner: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon and AdamW over the weights that are trained."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            hidden = parameter.dim() == 2 and any(part in name for part in HIDDEN) and "lora" not in name
            (matrices if hidden else others).append(parameter)
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=config.adamw_rate, betas=(0.9, 0.97), weight_decay=config.weight_decay)
    ]
    if matrices:
        optimisers.append(Muon(matrices, config.muon_rate, config.weight_decay, dtype=config.dtype))
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["full_rate"] = group["lr"]
    return optimisers


def rate_share(step: int, config: TrainConfig) -> float:
    """The share of the full rate in a step: a linear rise, then half a cosine down to `final_rate`."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    along = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.final_rate + (1 - config.final_rate) * 0.5 * (1 + math.cos(math.pi * min(along, 1.0)))
