"""The experiment on an action head, given what a trained model's slots say about recorded observations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mllm.checkpoint import load_checkpoint
from mllm.demonstrations import read_demonstration
from mllm.diffusion.arms import Subject, draw
from mllm.diffusion.denoiser import DenoiserConfig
from mllm.diffusion.fit import FitConfig, fitted
from mllm.diffusion.head import LIMIT
from mllm.diffusion.schedule import Schedule
from mllm.errors import PolicyError
from mllm.tensor_file import read_metadata
from mllm.training.config import TrainConfig
from mllm.training.data import Frames, find_demonstrations
from mllm.training.learner import Learner

# Observations at a time.
BATCH = 32
# Six of the pose, and the gripper's.
ACTION_DIM = 7


@dataclass(frozen=True)
class Features:
    """hidden: (n, chunk * hidden) float32, the slots' states.  actions: (n, chunk * 7) float32 in [-1, 1], the labels.
    episode: (n,) which demonstration each is of.
    """

    hidden: Tensor
    actions: Tensor
    episode: Tensor


@torch.no_grad()
def record_features(checkpoint: str | Path, folders: Sequence[str], count: int, seed: int = 0) -> Features:
    """What the slots of the checkpoint's model say about `count` frames of demonstrations, drawn by the seed from those
    after which a whole chunk is known.

    Raises PolicyError: no demonstrations, fewer frames, or a model without slots for whole actions.
    """
    model, tokenizer = load_checkpoint(checkpoint)
    config = model.config
    if model.action_slots is None:
        raise PolicyError(f"the model of {checkpoint} answers in tokens: it has no slots that stand for whole actions")
    paths = find_demonstrations(folders)
    frames = Frames([read_demonstration(path) for path in paths], config.cameras, config.proprio, [])
    learner = Learner(model, TrainConfig(name="features", data=tuple(folders)), phases=1).eval()
    whole = np.arange(len(frames)) + config.chunk <= frames.end
    for ahead in range(config.chunk):
        whole[: len(frames) - ahead] &= frames.valid[ahead:]
    places = np.flatnonzero(whole)
    if len(places) < count:
        raise PolicyError(f"the demonstrations have {len(places)} frames with a whole chunk: {count} were asked for")
    places = np.sort(np.random.default_rng(seed).choice(places, count, replace=False))
    hidden, actions = [], []
    for part in np.array_split(places, -(-count // BATCH)):
        batch = frames.batch(part, config.chunk, tokenizer)
        visual = model.visual_tokens(learner.pixels(batch.images, None))
        hidden.append(model.one_pass(*model.prompt(visual, batch.texts, learner.proprio(batch, None))).flatten(1))
        actions.append(torch.from_numpy(learner.normalised(batch.actions)).float().flatten(1))
    return Features(torch.cat(hidden), torch.cat(actions), torch.from_numpy(frames.episode[places]))


def kept_features(path: Path, checkpoint: str | Path, folders: Sequence[str], count: int) -> Features:
    """Those that `path` holds, or `record_features`, kept there.

    Raises PolicyError: see there; or the file was made of something else.
    """
    asked = json.dumps({"checkpoint": str(checkpoint), "folders": list(folders), "count": count})
    if not path.is_file():
        features = record_features(checkpoint, folders, count)
        part = path.with_suffix(".part")
        save_file(vars(features), part, {"asked": asked})
        part.replace(path)
    was = read_metadata(path).get("asked", "nothing")
    if was != asked:
        raise PolicyError(f"{path} holds the features of {was}, and {asked} was asked for: name another folder")
    return Features(**load_file(path))


@dataclass(frozen=True)
class HeadTask:
    """folder: where the full-precision head of each seed is kept.
    features: of which every fifth demonstration's are for measuring alone.
    calibration: observations that an arm is calibrated and distilled on.
    """

    folder: Path
    features: Features
    width: int = 96
    depth: int = 2
    schedule: Schedule = field(default_factory=lambda: Schedule(100, 10, LIMIT))
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=4000, batch=128))
    calibration: int = 512

    name = "action head"

    @property
    def facts(self) -> Mapping[str, Any]:
        drawn = hashlib.sha256(self.features.hidden.numpy().tobytes()).hexdigest()
        sizes = {"width": self.width, "depth": self.depth, "calibration": self.calibration, "features": drawn}
        return {name: asdict(getattr(self, name)) for name in ("schedule", "fit")} | sizes

    @cached_property
    def _held_out(self) -> Tensor:
        return self.features.episode % 5 == 4

    @property
    def _config(self) -> DenoiserConfig:
        hidden, actions = self.features.hidden, self.features.actions
        return DenoiserConfig(actions.shape[1], self.width, self.depth, condition=hidden.shape[1])

    def subject(self, seed: int) -> Subject:
        """The head is trained once on frozen features, and found in the folder from then on."""
        hidden, actions = (rows[~self._held_out] for rows in (self.features.hidden, self.features.actions))
        path = self.folder / f"head-{seed}.safetensors"
        model = fitted(path, self._config, actions, self.schedule, self.fit, seed, hidden)
        generator = torch.Generator().manual_seed(2 * seed)
        rows = torch.randint(len(hidden), (self.calibration,), generator=generator)
        noise = torch.randn(self.calibration, actions.shape[1], generator=generator)
        return Subject(model, self.schedule, noise, hidden[rows])

    def measure(self, subject: Subject, at: Callable[[int], nn.Module], seed: int) -> dict[str, float]:
        """On held-out observations, all from the same noise.

        "apart": root mean square difference of an action's number, in [-1, 1], from the full-precision head's.
        "pose apart": the same without the gripper's number, which is near -1 or 1 and now and then changes sides.
        "from the label": mean absolute difference from what the expert did.
        """
        hidden, labels = (rows[self._held_out] for rows in (self.features.hidden, self.features.actions))
        noise = torch.randn(labels.shape, generator=torch.Generator().manual_seed(2 * seed + 1))
        own = draw(at, subject.schedule, noise, hidden)
        full = draw(lambda _: subject.model, subject.schedule, noise, hidden)
        apart = (own - full).square().unflatten(1, (-1, ACTION_DIM))
        return {
            "apart": float(apart.mean().sqrt()),
            "pose apart": float(apart[..., :-1].mean().sqrt()),
            "from the label": float((own - labels).abs().mean()),
        }
