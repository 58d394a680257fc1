"""A policy's diffusion head, fine-tuned without data while its layers are quantised: TALoRA, and DFA's loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mllm.diffusion.arms import Subject, fine_tune, teach
from mllm.diffusion.denoiser import Denoiser
from mllm.diffusion.head import DiffusionHead
from mllm.errors import PolicyError
from mllm.sweep import Clip, replay
from mllm.vla import VLA
from mllm.vla_policy import VLAPolicy
from quant.dfa import DistilConfig
from quant.packed import PackedLinear
from quant.talora import LayerGrids, TaloraConfig


@dataclass(frozen=True)
class TuneConfig:
    """talora: its adapters; one is plain LoRA.  distil: how they are trained.  dfa: whether the loss weighs steps."""

    talora: TaloraConfig = field(default_factory=lambda: TaloraConfig(adapters=2))
    distil: DistilConfig = field(default_factory=DistilConfig)
    dfa: bool = False

    def __post_init__(self) -> None:
        if not self.talora.adapters:
            raise PolicyError("TuneConfig.talora has 0 adapters: fine-tuning needs one or more")


def diffusion_head(model: VLA) -> DiffusionHead:
    """Raises PolicyError: the model has another head."""
    if not isinstance(model.action_head, DiffusionHead):
        raise PolicyError(
            f"the model's head is '{model.config.head}': TALoRA and DFA are for the steps of head 'diffusion'"
        )
    return model.action_head


def tune_head_(policy: VLAPolicy, teacher: Denoiser, clips: Sequence[Clip], config: TuneConfig) -> dict[str, Any]:
    """Gives the policy's model a head whose packed layers hold fine-tuned weights, a copy for each adapter in use.

    policy: its layers are packed (`quant.convert.quantize_`), the head's too; their grids stay.
    teacher: the head's denoiser in full precision.
    clips: on which the rest of the quantised model says what the head is given. The teacher draws from that and the
        head's own noise, and the student learns its answers: no label is looked at.
    Returns the table from steps to copies, and the first and the last losses, each a mean over all steps.
    Raises PolicyError: another head, or one with a layer that is not packed.
    """
    model = policy.model
    head, hidden = diffusion_head(model), _hidden(policy, clips)
    noise = head.noise.float().flatten().expand(len(hidden), -1)
    subject = Subject(teacher, head.schedule, noise, hidden)
    grids = {
        name: LayerGrids.of(layer, packed)
        for name, packed in head.denoiser.named_modules()
        if isinstance(packed, PackedLinear) and isinstance(layer := teacher.get_submodule(name), nn.Linear)
    }
    if left := [name for name, layer in head.denoiser.named_modules() if isinstance(layer, nn.Linear)]:
        raise PolicyError(f"layer '{left[0]}' of the head is not quantised: quantise all of them before fine-tuning")
    talora, losses = fine_tune(subject, grids, teach(subject), config.talora, config.distil, config.dfa)
    steps = head.schedule.steps
    deployed = talora.deploy(steps)
    deployed.model.eval()
    tuned = replace(model.config.diffusion, table=tuple(deployed.table))
    model.config = replace(model.config, diffusion=tuned)
    model.action_head = head.with_weights(deployed)
    ends = {"first": losses[:steps], "last": losses[-steps:]}
    return {"table": deployed.table} | {name: sum(part) / max(len(part), 1) for name, part in ends.items()}


def _hidden(policy: VLAPolicy, clips: Sequence[Clip]) -> Tensor:
    """(looks, chunk * hidden) float32: what the head is given whenever the policy looks."""
    seen: list[Tensor] = []
    handle = diffusion_head(policy.model).register_forward_pre_hook(
        lambda head, given: seen.append(given[0].float().flatten(1))
    )
    try:
        replay(policy, clips)
    finally:
        handle.remove()
    return torch.cat(seen)
