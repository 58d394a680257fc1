"""Every arm on every task and seed, one row each, in a folder where it goes on after a kill."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from mllm.config import check_sizes
from mllm.diffusion.arms import ARMS, Arm, Made, QuantiseConfig, Subject, draw, make, prepare
from mllm.errors import PolicyError

ROWS, SETTINGS = "rows.jsonl", "settings.json"
# Arm -> the one that it must be better than, for the method to hold.
CLAIMS = {
    "INT": "INT min-max",
    "signed FP": "INT",
    "MSFP": "signed FP",
    "signed FP + LoRA": "INT + LoRA",
    "MSFP + LoRA": "signed FP + LoRA",
    "MSFP + LoRA of equal size": "MSFP + LoRA",
    "MSFP + TALoRA": "MSFP + LoRA of equal size",
    "MSFP + TALoRA + DFA": "MSFP + TALoRA",
}


@dataclass(frozen=True)
class ExperimentConfig:
    """seeds: each has its own model, noise and fine-tuning, which all its arms share.  quantise: see there."""

    seeds: int = 3
    quantise: QuantiseConfig = field(default_factory=QuantiseConfig)

    def __post_init__(self) -> None:
        check_sizes(self, {"seeds": (1, 1000)})


class Task(Protocol):
    """What is quantised, and what counts.

    name: of its rows.  facts: what these depend on, as JSON can hold it.
    """

    name: str

    @property
    def facts(self) -> Mapping[str, Any]: ...

    def subject(self, seed: int) -> Subject:
        """What the arms of a seed start from."""

    def measure(self, subject: Subject, at: Callable[[int], nn.Module], seed: int) -> dict[str, float]:
        """Metric -> value, of the denoiser that `at` gives for each step; the first is the main one, and less is
        better.
        """


def run_experiment(
    folder: Path,
    tasks: Sequence[Task],
    config: ExperimentConfig,
    say: Callable[[str], object],
    arms: Sequence[Arm] = ARMS,
) -> list[dict[str, Any]]:
    """Runs what `folder` lacks, and returns all rows. A row is on the disk before the next arm begins.

    say: takes a line of progress.  Raises PolicyError: the folder's rows were made with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        check_settings(folder, task.name, {"quantise": asdict(config.quantise), **task.facts})
    rows = read_rows(folder)
    done = {(row["task"], row["seed"], row["arm"]) for row in rows}
    for task in tasks:
        for seed in range(config.seeds):
            missing = [arm for arm in arms if (task.name, seed, arm.name) not in done]
            for row in _run_seed(task, seed, missing, config.quantise) if missing else ():
                with (folder / ROWS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                rows.append(row)
                told = ", ".join(f"{name} {value:.4g}" for name, value in row["metrics"].items())
                say(f"{task.name}, seed {seed}, {row['arm']}: {told}")
    return rows


def _run_seed(task: Task, seed: int, arms: Sequence[Arm], config: QuantiseConfig) -> Iterator[dict[str, Any]]:
    subject = task.subject(seed)
    prepared = prepare(subject, {arm.family for arm in arms if arm.family}, config)
    for arm in arms:
        made = make(arm, subject, prepared, config, seed)
        metrics = task.measure(subject, made.at, seed)
        yield {"task": task.name, "seed": seed, "arm": arm.name, "metrics": metrics, **_facts(made, subject)}


def _facts(made: Made, subject: Subject) -> dict[str, Any]:
    """Bytes of the weights as they are used, which adapter each step has, how far the packed model draws from the fake-
    quantised one (root mean square, for the calibration's noise), and the loss at the end of fine-tuning.
    """
    if made.talora is None:
        return {"bytes": sum(weight.numel() * weight.element_size() for weight in subject.model.parameters())}
    deployed = made.talora.deploy(subject.schedule.steps)
    drawn = [draw(at, subject.schedule, subject.noise, subject.condition) for at in (made.at, deployed.at)]
    facts: dict[str, Any] = {"bytes": deployed.packed_bytes(), "table": deployed.table}
    facts["deployed"] = float((drawn[0] - drawn[1]).square().mean().sqrt())
    if made.losses:
        last = made.losses[-subject.schedule.steps * 5 :]
        facts["loss"] = statistics.fmean(last)
    return facts


def check_settings(folder: Path, task: str, settings: Mapping[str, Any]) -> None:
    """Notes the settings of a task's rows. Raises PolicyError: others are noted already."""
    path = folder / SETTINGS
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    now = json.loads(json.dumps(settings))
    was = known.setdefault(task, now)
    changed = [
        f"{key} was {was.get(key)} and is {now.get(key)}" for key in {**was, **now} if was.get(key) != now.get(key)
    ]
    if changed:
        raise PolicyError(
            f"the rows of '{task}' in {folder} began otherwise: {'; '.join(changed)}. Name another folder"
        )
    path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder; a last line that a kill cut off is taken away, and its arm runs again.

    Raises PolicyError: another line is no row.
    """
    path = folder / ROWS
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({**row, "task": row["task"], "seed": row["seed"], "arm": row["arm"], "metrics": row["metrics"]})
        except (ValueError, KeyError, TypeError) as error:
            raise PolicyError(f"{path}, line {number} is no row of this experiment: {error}") from error
    return rows


@dataclass(frozen=True)
class Outcome:
    """An arm over n seeds, of one metric.

    spread: standard deviation over the seeds, None of one seed.
    against: the arm of `CLAIMS`; difference: mean over the seeds of what this arm has more than that one, deviation its
        standard deviation, and better: in how many seeds it has less.  None where there is nothing to compare with.
    """

    arm: str
    n: int
    mean: float
    spread: float | None
    bytes: int
    against: str | None = None
    difference: float | None = None
    deviation: float | None = None
    better: int | None = None


def outcomes(rows: Sequence[Mapping[str, Any]], task: str, metric: str) -> list[Outcome]:
    """Of every arm of a task that has rows, in the order of `ARMS`."""
    values: dict[str, dict[int, float]] = {}
    sizes: dict[str, int] = {}
    for row in rows:
        if row["task"] == task:
            values.setdefault(row["arm"], {})[row["seed"]] = row["metrics"][metric]
            sizes[row["arm"]] = max(row["bytes"], sizes.get(row["arm"], 0))
    found = []
    for arm in (arm.name for arm in ARMS if arm.name in values):
        own, other = values[arm], values.get(CLAIMS.get(arm, ""), {})
        apart = [own[seed] - other[seed] for seed in sorted(own) if seed in other]
        one = Outcome(arm, len(own), statistics.fmean(own.values()), _spread(list(own.values())), sizes[arm])
        if apart:
            found.append(
                Outcome(
                    *(one.arm, one.n, one.mean, one.spread, one.bytes, CLAIMS[arm]),
                    *(statistics.fmean(apart), _spread(apart), sum(value < 0 for value in apart)),
                )
            )
        else:
            found.append(one)
    return found


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
