"""A vision-language-action model with packed layers: calibrated on recorded observations, and what that costs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from torch import nn

from mllm.diffusion.arms import ENDS
from mllm.errors import PolicyError
from mllm.sweep import Clip, Replay, deviation, replay
from mllm.vla_policy import VLAPolicy
from quant.calibration import Inputs, calibrate
from quant.config import MSFPConfig
from quant.convert import Report, quantize_, replace_
from quant.packed import PackedLinear

# What goes to the robot is a few numbers, each of which counts.
LEAST = {"action_head.*": (8, 8)}
# Where the head is fine-tuned, only its first layers and its last.
TUNED = {f"action_head.denoiser.{name}": (8, 8) for name in ENDS}
EXCLUDE = {
    "proprio_projector.*": "the robot's state counts to the digit, and is one token",
    "language_model.lm_head": "of its rows only those of the action tokens are read",
}


def vla_config(bits: int = 4, act_bits: int | None = 6, family: str = "msfp", tuned_head: bool = False) -> MSFPConfig:
    """How the layers of a `mllm.vla.VLA` are quantised; see `MSFPConfig`.

    tuned_head: whether `mllm.diffusion.tune` follows, so that the head can do with fewer bits too.
    """
    return MSFPConfig(bits, act_bits, family, least=TUNED if tuned_head else LEAST, exclude=EXCLUDE)


def observe(policy: VLAPolicy, clips: Sequence[Clip]) -> dict[str, Inputs]:
    """What the linear layers of the policy's model are given on these clips.

    Raises PolicyError: the model is quantised already.
    """
    packed = [name for name, part in policy.model.named_modules() if isinstance(part, PackedLinear)]
    if packed:
        raise PolicyError(f"layer '{packed[0]}' is quantised already: start from the model as it was trained")
    return calibrate(policy.model, lambda: replay(policy, clips))


@contextmanager
def quantised(
    policy: VLAPolicy,
    config: MSFPConfig,
    seen: Mapping[str, Inputs],
    clips: Sequence[Clip],
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
) -> Iterator[Report]:
    """The policy's model is quantised within, and afterwards as it was, with its own head.

    seen, clips: of `observe`.
    """
    model = policy.model
    before, head, described = {name: model.get_submodule(name) for name in seen}, model.action_head, model.config
    try:
        yield quantize_(model, config, seen, lambda: replay(policy, clips), filter_fn)
    finally:
        model.action_head, model.config = head, described
        for name, layer in before.items():
            replace_(model, name, layer)


def hold_out(clips: Sequence[Clip], count: int, seed: int = 0) -> tuple[list[Clip], list[Clip]]:
    """Clips to calibrate on, and `count` or a few more to check the result, of other demonstrations.

    Raises PolicyError: too few demonstrations to tell them apart.
    """
    paths = sorted({clip.path for clip in clips})
    np.random.default_rng(seed).shuffle(paths)  # type: ignore[arg-type]
    held: set[object] = set()
    for path in paths:
        if sum(clip.path in held for clip in clips) >= count:
            break
        held.add(path)
    kept = [clip for clip in clips if clip.path not in held]
    if not kept:
        raise PolicyError(f"{len(paths)} episodes leave none to calibrate on beside {count} clips to check: give more")
    return kept, [clip for clip in clips if clip.path in held]


def group_of(name: str) -> str:
    """Layers that do the same in every block: "decoder.layers.3.fc" -> "decoder.layers.*.fc"."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def sensitivity(
    policy: VLAPolicy,
    config: MSFPConfig,
    seen: Mapping[str, Inputs],
    clips: Sequence[Clip],
    checked: Sequence[Clip],
    reference: Replay,
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Of every group of layers (`group_of`), in the order in which they run: how far the actions on the clips of
    `checked` are from the reference's (`mllm.sweep.deviation`) where this group alone is quantised.
    """
    for group in dict.fromkeys(map(group_of, seen)):
        with quantised(policy, config, seen, clips, lambda name, layer: group_of(name) == group):  # noqa: B023
            yield group, deviation(reference, replay(policy, checked))
