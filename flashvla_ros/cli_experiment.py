"""The command that tests claims about the methods."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if TYPE_CHECKING:
    from mllm.diffusion.experiment import Task
    from mllm.diffusion.fit import FitConfig


@dataclass(frozen=True)
class Experiment:
    """Test what is claimed: `msfp` is MSFP, TALoRA and DFA against integers, signed formats and plain LoRA, all arms
    alike, on a small diffusion model of handwritten digits; or, with --demonstrations, on a diffusion action head.

    Kill it whenever you like: the same command goes on. Writes rows, models, a table as JSON and a picture.
    """

    what: tyro.conf.Positional[Literal["msfp"]]
    """Which claims."""
    out: tyro.conf.Positional[Path]
    """Folder for what is written."""
    seeds: int = 3
    """Each with a model of its own."""
    bits: int = 4
    """Of weights and inputs; the first and the last layers have 8."""
    adapters: int = 2
    """Of TALoRA, in each layer."""
    rank: int = 2
    """Of an adapter."""
    updates: int = 1200
    """Of fine-tuning."""
    fit_steps: int = 5000
    """Of training the full-precision model."""
    samples: int = 10_000
    """Digits drawn by every arm."""
    demonstrations: tuple[str, ...] = ()
    """Folders, as flashvla collect writes them: in place of digits an action head is put to the test, on what the
    model's slots say about their frames. Every fifth demonstration's are only for measuring."""
    frames: int = 4000
    """Of the demonstrations."""
    checkpoint: str = ""
    """Folder of that model's weights; those that come with the package if not given."""
    threads: int = 1
    """Of torch."""
    json: bool = False
    """Print the result as JSON on stdout; everything else goes to stderr."""

    def run(self) -> int:
        import torch

        from flashvla_ros.experiment_table import show
        from mllm.diffusion.arms import QuantiseConfig
        from mllm.diffusion.experiment import ExperimentConfig
        from mllm.diffusion.fit import FitConfig
        from quant.dfa import DistilConfig

        torch.set_num_threads(self.threads)
        distil = DistilConfig(updates=self.updates)
        quantise = QuantiseConfig(self.bits, adapters=self.adapters, rank=self.rank, distil=distil)
        task = self.task(FitConfig(self.fit_steps, batch=128))
        return show(self.out, [task], ExperimentConfig(self.seeds, quantise), self.json)

    def task(self, fit: FitConfig) -> Task:
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.demonstrations:
            from mllm.diffusion.digits_task import DigitsTask

            return DigitsTask(self.out, fit=fit, samples=self.samples)
        from mllm.diffusion.head_task import HeadTask, kept_features
        from mllm.hf_config import WEIGHTS

        checkpoint, path = self.checkpoint or str(WEIGHTS / "mini"), self.out / "features.safetensors"
        return HeadTask(self.out, kept_features(path, checkpoint, self.demonstrations, self.frames), fit=fit)


COMMANDS = {"experiment": Experiment}
