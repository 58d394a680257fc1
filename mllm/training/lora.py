"""Low-rank adapters of the decoder (Hu et al., arXiv 2106.09685) by the peft library, as OpenVLA is fine-tuned."""

from __future__ import annotations

import copy

from torch import nn

from mllm.errors import PolicyError
from mllm.torchvision_import import import_beside_torchvision
from mllm.vla import VLA

PROJECTIONS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def add_adapters(model: VLA, rank: int) -> None:
    """Puts adapters beside every projection of the decoder's layers; only they are trained from then on.

    Alpha is twice the rank (our choice). Weights that the checkpoint lacks, such as a new action head, stay trainable.
    Raises PolicyError: peft is not installed.
    """
    try:
        peft = import_beside_torchvision("peft")
    except ImportError as error:
        raise PolicyError("training adapters needs peft: pip install 'flashvla_ros[train]'") from error
    model.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS), model)
    for part in (model.action_head, model.proprio_projector):
        if part is not None:
            part.requires_grad_(True)
    if model.action_slots is not None:
        model.action_slots.requires_grad_(True)


def merged(model: VLA) -> VLA:
    """A copy whose adapters are added to the weights that they stand beside: an ordinary model again."""
    from peft.tuners.lora import LoraLayer

    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer):
                child.merge()
                base = child.get_base_layer()
                assert isinstance(base, nn.Module)
                setattr(parent, name, base)
    return model
