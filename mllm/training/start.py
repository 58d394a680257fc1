"""What a run starts from: the model's configuration, its weights, and what the demonstrations say about both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mllm.actions import ActionStatistics
from mllm.checkpoint import load_checkpoint
from mllm.config import VLAConfig, named_config
from mllm.demonstrations import Demonstration
from mllm.errors import PolicyError
from mllm.tokenizer import Tokenizer, WordTokenizer
from mllm.training.config import TrainConfig
from mllm.vla import VLA, init_random

# Of the demonstrations' provenance: what a policy must be shown images with.
RENDER = ("renderer", "image_size")


def make_model(
    config: TrainConfig, demos: Sequence[Demonstration], say: Callable[[str], None]
) -> tuple[VLA, Tokenizer]:
    """The model with its first weights: random by the seed, or those of `config.init` wherever they fit."""
    if not config.init:
        return init_random(VLA(fitted(named_config(config.model), config, demos)), config.seed), WordTokenizer()
    loaded, tokenizer = load_checkpoint(config.init)
    widen(loaded, demos)
    model = init_random(VLA(fitted(loaded.config, config, demos)), config.seed)
    own, given = model.state_dict(), loaded.state_dict()
    shared = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict({**own, **shared})
    anew = sorted(set(own) - set(shared))
    if anew:
        say(f"random at first, as the checkpoint has none that fit: {', '.join(anew)}")
    return model, tokenizer


def fitted(vla: VLAConfig, config: TrainConfig, demos: Sequence[Demonstration]) -> VLAConfig:
    """`vla` with the run's changes, the range of the demonstrations' proprioception, and how they were drawn."""
    change: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in config.change.items()
    }
    names = change.get("proprio", vla.proprio)
    if names != vla.proprio:
        low, high = proprio_range(names, demos)
        change["proprio_statistics"] = ActionStatistics(tuple(low), tuple(high))
    drawn = demos[0].provenance
    render = {key: int(drawn[key]) if drawn[key].isdigit() else drawn[key] for key in RENDER if key in drawn}
    try:
        return replace(vla, **{"render": render, **change})
    except TypeError as error:
        raise PolicyError(f"TrainConfig.change: {error}") from error


def proprio_range(names: Sequence[str], demos: Sequence[Demonstration]) -> np.ndarray:
    """(2, numbers): between which of the demonstrations' numbers all but a hundredth at either end lie."""
    rows = np.concatenate([np.concatenate([demo.proprio[name] for name in names], axis=1) for demo in demos])
    return np.quantile(rows, [0.01, 0.99], axis=0)


@torch.no_grad()
def widen(model: VLA, demos: Sequence[Demonstration]) -> None:
    """Lets the range of a model's proprioception hold that of the demonstrations too, where it was narrower.

    What lies outside is clipped, and a model cannot learn from what it does not see: a hand over a floor, say, after
    training over a table. Answers inside the old range stay what they were, to rounding.
    """
    config = model.config
    if config.proprio_statistics is None or model.proprio_projector is None:
        return
    old = np.array([config.proprio_statistics.low, config.proprio_statistics.high])
    seen = proprio_range(config.proprio, demos)
    mask = np.array(config.proprio_statistics.mask)  # a number without it is left as it is, whatever its range
    new = np.where(mask, [np.minimum(old[0], seen[0]), np.maximum(old[1], seen[1])], old)
    # An input was (2 v - low - high) / (high - low): the new one times `scale` plus `offset`.
    span = np.where(old[1] > old[0], old[1] - old[0], new[1] - new[0])
    span = np.where(span > 0, span, 1)
    scale = np.where(new[1] > new[0], (new[1] - new[0]) / span, 1)
    offset = (new.sum(0) - old.sum(0)) / span
    layer = model.proprio_projector.fc1
    weight = layer.weight.double()
    layer.bias.add_(weight @ torch.from_numpy(offset))
    layer.weight.copy_(weight * torch.from_numpy(scale))
    model.config = replace(config, proprio_statistics=ActionStatistics(tuple(new[0]), tuple(new[1]), tuple(mask)))
