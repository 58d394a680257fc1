"""The command that tests claims about the methods."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class ExperimentMSFP:
    """MSFP, TALoRA and DFA against integers, signed formats and plain LoRA: small diffusion models, all arms alike.

    Kill it whenever you like: the same command goes on. Writes rows, models, a table as JSON and a picture.
    """

    out: tyro.conf.Positional[Path]
    """Folder for what is written."""
    seeds: int = 3
    """Each with a model of its own."""
    bits: int = 4
    """Of weights and inputs; the first and the last layer have 8."""
    adapters: int = 2
    """Of TALoRA, in each layer."""
    rank: int = 2
    """Of an adapter."""
    updates: int = 2000
    """Of fine-tuning."""
    threads: int = 1
    """Of torch."""
    json: bool = False
    """Print the result as JSON on stdout; everything else goes to stderr."""

    def run(self) -> int:
        import torch

        from flashvla_ros.experiment_table import show
        from mllm.diffusion.arms import QuantiseConfig
        from mllm.diffusion.digits_task import DigitsTask
        from mllm.diffusion.experiment import ExperimentConfig
        from quant.dfa import DistilConfig

        torch.set_num_threads(self.threads)
        distil = DistilConfig(updates=self.updates)
        quantise = QuantiseConfig(self.bits, adapters=self.adapters, rank=self.rank, distil=distil)
        return show(self.out, [DigitsTask(self.out)], ExperimentConfig(self.seeds, quantise), self.json)


@dataclass(frozen=True)
class Experiment:
    """Test what is claimed about a method: `msfp` compares number formats and fine-tuning of diffusion models."""

    what: Annotated[ExperimentMSFP, tyro.conf.subcommand("msfp")]

    def run(self) -> int:
        return self.what.run()


COMMANDS = {"experiment": Experiment}
