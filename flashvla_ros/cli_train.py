"""Commands that train, and that hand on what was learned."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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

        trainer = Trainer(read_train_config(self.config), self.runs, say)
        done = trainer.run(stop=asked_to_stop())
        if done:
            sys.stdout.write(f"{trainer.folder / 'checkpoint'}\n")
        return 0 if done else 1


@dataclass(frozen=True)
class Dagger:
    """Train, let the policy act while the expert says what it should have done, and train on that too, in rounds.

    Stop it at any time: the same command goes on where it was.
    """

    config: tyro.conf.Positional[Path]
    """YAML file of the first run, as for `flashvla train`."""
    suites: tuple[str, ...] = ("libero_spatial",)
    tasks: str = "all"
    """all, or indices such as 0-3,7."""
    rounds: int = 2
    episodes: int = 10
    """For each task in each round."""
    steps: int = 2000
    """Of the optimiser in each round."""
    weight: float = 1.0
    """How much more often frames of the policy's episodes are drawn than those of demonstrations."""
    beta: float = 0.5
    """Share of the episodes in which the expert takes over now and then."""
    workers: int = 2
    """Processes that play episodes."""
    runs: Path = Path("runs")
    """Folder in which every run has a folder of its own."""

    def run(self) -> int:
        from flashvla_ros.cli_data import Line
        from mllm.training.config import read_train_config
        from sim.dagger_rounds import DaggerConfig, run_rounds
        from sim.schedule import parse_numbers

        config = DaggerConfig(
            suites=self.suites,
            tasks=() if self.tasks == "all" else parse_numbers(self.tasks, "--tasks"),
            rounds=self.rounds,
            episodes=self.episodes,
            steps=self.steps,
            weight=self.weight,
            beta=self.beta,
            workers=self.workers,
        )
        last = run_rounds(read_train_config(self.config), config, self.runs, say, Line(), asked_to_stop())
        if last is not None:
            sys.stdout.write(f"{last}\n")
        return 0 if last is not None else 1


@dataclass(frozen=True)
class Ship:
    """Write what a run has learned as a checkpoint for others: its weights, curves, and how it came about."""

    run_folder: tyro.conf.Positional[Path]
    """Folder of a run of `flashvla train`."""
    out: tyro.conf.Positional[Path]
    """Folder to write."""
    dtype: Literal["float16", "float32"] = "float16"
    """float16 is half the size, and rounds: evaluate what was written. float32 gives the same actions."""

    def run(self) -> int:
        import torch

        from mllm.training.ship import ship

        ship(self.run_folder, self.out, getattr(torch, self.dtype))
        sys.stdout.write(f"{self.out}\n")
        return 0


@dataclass(frozen=True)
class Card:
    """Write a checkpoint's README from its training and from evaluations of it."""

    checkpoint: tyro.conf.Positional[Path]
    """Folder that `flashvla ship` wrote."""
    results: tuple[str, ...]
    """Runs of `flashvla eval`, one or several; of a sweep, FILE:ARM."""
    blind: str | None = None
    """Such a run with --policy blind."""
    misled: str | None = None
    """Such a run with --policy misled."""
    shuffled: str | None = None
    """Such a run with --draw shuffled."""

    def run(self) -> int:
        from sim.card import write_card
        from sim.statistics import Side

        taken = {
            "nothing, but any object is asked for (shuffled starts)": self.shuffled,
            "sight (grey images)": self.blind,
            "the instruction (about something else in the scene)": self.misled,
        }
        ablations = {name: Side.parse(run) for name, run in taken.items() if run is not None}
        results = [Side.parse(run) for run in self.results]
        sys.stdout.write(f"{write_card(self.checkpoint, results, ablations)}\n")
        return 0


def say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def asked_to_stop() -> Callable[[], bool]:
    """Answers whether SIGINT or SIGTERM has come since, which then end nothing by themselves."""
    came: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda given, frame: came.append(given))
    return lambda: bool(came)


COMMANDS = {"train": Train, "dagger": Dagger, "ship": Ship, "card": Card}
