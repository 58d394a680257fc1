"""The experiment on scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm.diffusion.arms import Subject, draw
from mllm.diffusion.denoiser import DenoiserConfig
from mllm.diffusion.digits import PIXELS, Classifier, digits, frechet, train_classifier
from mllm.diffusion.fit import FitConfig, fitted
from mllm.diffusion.schedule import Schedule

# Pixels lie in [-1, 1]. At the noisiest level an error counts 157 times, and without a limit a pixel that leaves the
# first layer's grid never returns; at 1 the full-precision model draws twice as far from the digits as at 1.5.
LIMIT = 1.5


@dataclass(frozen=True)
class DigitsTask:
    """folder: where the full-precision model of each seed is kept.
    samples: digits drawn by each arm.  calibration: trajectories that it is calibrated and distilled on.
    """

    folder: Path
    denoiser: DenoiserConfig = field(default_factory=lambda: DenoiserConfig(PIXELS, width=96, depth=2))
    schedule: Schedule = field(default_factory=lambda: Schedule(limit=LIMIT))
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=5000, batch=128))
    samples: int = 10_000
    calibration: int = 512
    _drawn: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    name = "digits"

    @property
    def facts(self) -> Mapping[str, Any]:
        sizes = {"samples": self.samples, "calibration": self.calibration}
        return {name: asdict(getattr(self, name)) for name in ("denoiser", "schedule", "fit")} | sizes

    @cached_property
    def _classifier(self) -> Classifier:
        return train_classifier()

    @cached_property
    def _real(self) -> Tensor:
        return self._classifier.features(digits()[0])

    def subject(self, seed: int) -> Subject:
        """The model is trained once, and found in the folder from then on."""
        path = self.folder / f"digits-{seed}.safetensors"
        model = fitted(path, self.denoiser, digits()[0], self.schedule, self.fit, seed)
        return Subject(model, self.schedule, self._noise(2 * seed, self.calibration))

    def _noise(self, seed: int, rows: int) -> Tensor:
        return torch.randn(rows, PIXELS, generator=torch.Generator().manual_seed(seed))

    def measure(self, subject: Subject, at: Callable[[int], nn.Module], seed: int) -> dict[str, float]:
        """Distances of the arm's digits, all from the same noise.

        "frechet to full": from the full-precision model's, which is what fine-tuning without data can aim at.
        "frechet": from the real digits.  "apart": root mean square difference of a pixel, whose range is 2, from the
        full-precision model's.
        """
        noise = self._noise(2 * seed + 1, self.samples)
        own = draw(at, subject.schedule, noise)
        if seed not in self._drawn:
            self._drawn[seed] = draw(lambda _: subject.model, subject.schedule, noise)
        full = self._drawn[seed]
        features, reference = self._classifier.features(own), self._classifier.features(full)
        return {
            "frechet to full": frechet(reference, features),
            "frechet": frechet(self._real, features),
            "apart": float((own - full).square().mean().sqrt()),
        }
