"""Commands that train."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Train:
    """Train a policy by behaviour cloning. Stop it at any time, even by kill -9: the same command goes on exactly.

    Several GPUs or processes: torchrun --nproc-per-node 4 -m flashvla_ros.cli train CONFIG.
    """

    config: tyro.conf.Positional[Path]
    """YAML file with the fields of `mllm.training.config.TrainConfig`."""
    runs: Path = Path("runs")
    """Folder in which the run has a folder of its own."""

    def run(self) -> int:
        from mllm.training.config import read_train_config
        from mllm.training.trainer import Trainer

        stopping: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda given, frame: stopping.append(given))
        trainer = Trainer(read_train_config(self.config), self.runs, lambda line: print(line, file=sys.stderr))
        done = trainer.run(stop=lambda: bool(stopping))
        if done:
            sys.stdout.write(f"{trainer.folder / 'checkpoint'}\n")
        return 0 if done else 1


COMMANDS = {"train": Train}
