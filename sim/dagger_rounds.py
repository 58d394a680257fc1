"""DAgger in rounds (Ross, Gordon and Bagnell, 2011): the policy acts, the expert labels, and training goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mllm.errors import PolicyError
from mllm.hf_config import load_config
from mllm.training.config import TrainConfig
from mllm.training.trainer import Trainer
from sim.collect import CollectConfig, Progress, collect
from sim.dagger import PolicyMix
from sim.errors import ConfigurationError

# Seeds of one round's episodes begin here times the round's number, far from those of demonstrations; our choice.
SEEDS_OF_ROUND = 1_000_000


@dataclass(frozen=True)
class DaggerConfig:
    """rounds: how often.  suites: whose tasks are played, all of them or those of the indices `tasks`.

    episodes: for each task in each round.

    steps: of the optimiser in each round, from the last round's averaged weights.
    weight: how much more often frames of the policy's own episodes are drawn than those of demonstrations.
    beta: see `sim.dagger.PolicyMix`.  workers: processes that play.
    """

    suites: tuple[str, ...]
    tasks: tuple[int, ...] = ()
    rounds: int = 2
    episodes: int = 10
    steps: int = 2000
    weight: float = 1.0
    beta: float = 0.5
    workers: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "suites", tuple(self.suites))
        if not self.suites:
            raise ConfigurationError("DaggerConfig.suites is empty: name at least one suite")
        for name, high in (("rounds", 1000), ("episodes", 10_000), ("steps", 10**9), ("workers", 256)):
            if not 1 <= getattr(self, name) <= high:
                raise ConfigurationError(f"DaggerConfig.{name} is {getattr(self, name)}: it must be from 1 to {high}")


def run_rounds(
    first: TrainConfig,
    config: DaggerConfig,
    runs: Path,
    say: Callable[[str], None],
    report: Callable[[Progress], None],
    stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Trains `first`, where that is not done yet, and the rounds after it, each a run `<name>-dagger-<round>`.

    Every part goes on where it was when the same call is made again. Returns the folder of the last checkpoint, or None
    where `stop` asked for an end.
    """
    run = first
    for number in range(config.rounds + 1):
        if number:
            checkpoint = runs / run.name / "checkpoint"
            folder = runs / first.name / "dagger" / f"round-{number}"
            play(checkpoint, config, number, folder, report, stop)
            if stop():
                return None
            run = replace(
                run,
                name=f"{first.name}-dagger-{number}",
                init=str(checkpoint),
                change={},
                data=(*run.data, str(folder)),
                steps=config.steps,
                source_weights={**run.source_weights, "dagger": config.weight},
            )
        say(f"training {run.name}")
        if not Trainer(run, runs, say).run(stop=stop):
            return None
    return runs / run.name / "checkpoint"


def play(
    checkpoint: Path,
    config: DaggerConfig,
    number: int,
    folder: Path,
    report: Callable[[Progress], None],
    stop: Callable[[], bool],
) -> None:
    """Collects one round's episodes under `folder`, until `stop` says so. Raises PolicyError: one ended in an error."""
    render = load_config(checkpoint).render
    options = {"checkpoint": str(checkpoint), "threads": 1}
    for suite in config.suites:
        collecting = CollectConfig(
            suite=suite,
            tasks=config.tasks,
            episodes=config.episodes,
            seed=number * SEEDS_OF_ROUND,
            images="webp",
            policy=PolicyMix("mini", options, config.beta),
            **render,  # type: ignore[arg-type]
        )
        end = collect(collecting, folder, config.workers, report, stop=stop)
        if end.errors:
            raise PolicyError(f"{end.errors} episodes ended in an error; {folder / suite / 'manifest.json'} says why")
        if stop():
            return
