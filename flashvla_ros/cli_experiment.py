"""The command that tests claims about the methods."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Experiment:
    """Test what is claimed: `msfp` is MSFP, TALoRA and DFA against integers, signed formats and plain LoRA, on a small
    diffusion model of handwritten digits, all arms alike.

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
    """Drawn by every arm."""
    demonstrations: tuple[str, ...] = ()
    """Folders, as flashvla collect writes them: an action head is put to the same test, on what the model's slots say
    about their frames."""
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
        from mllm.diffusion.digits_task import DigitsTask
        from mllm.diffusion.experiment import ExperimentConfig, Task
        from mllm.diffusion.fit import FitConfig
        from quant.dfa import DistilConfig

        torch.set_num_threads(self.threads)
        distil = DistilConfig(updates=self.updates)
        quantise = QuantiseConfig(self.bits, adapters=self.adapters, rank=self.rank, distil=distil)
        digits = DigitsTask(self.out, fit=FitConfig(self.fit_steps, batch=128), samples=self.samples)
        tasks: list[Task] = [digits]
        if self.demonstrations:
            from mllm.diffusion.head_task import HeadTask, record_features
            from mllm.hf_config import WEIGHTS

            features = record_features(self.checkpoint or WEIGHTS / "mini", self.demonstrations, self.frames)
            tasks.append(HeadTask(self.out, features, fit=FitConfig(self.fit_steps, batch=128)))
        return show(self.out, tasks, ExperimentConfig(self.seeds, quantise), self.json)


COMMANDS = {"experiment": Experiment}
