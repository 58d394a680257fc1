"""A folder of demonstrations: where each episode lies, what was tried, and LIBERO's view of it.

<suite>/manifest.json               versions, settings, counts of each task, failures and errors by seed
<suite>/<task>/seed_00000042.hdf5   an episode, see `mllm.demonstrations`
<suite>/<task>_demo.hdf5            LIBERO's file of the task: `data/demo_i` are links into the episodes
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py

from mllm.demonstrations import layout_attributes, write_atomically
from mllm.errors import PolicyError
from sim.errors import ConfigurationError
from sim.tasks import TaskSpec, find_task
from sim.versions import provenance

FORMAT = 1


class SuiteFolder:
    """The demonstrations of one suite under `root`."""

    def __init__(self, root: Path, suite: str) -> None:
        self.suite = suite
        self.path = Path(root) / suite
        self.manifest_file = self.path / "manifest.json"
        self.manifest: dict[str, Any] = {}

    def task_folder(self, task: int) -> Path:
        return self.path / find_task(self.suite, task).name

    def episode(self, task: int, seed: int) -> Path:
        return self.task_folder(task) / f"seed_{seed:08d}.hdf5"

    def episodes(self, task: int) -> list[Path]:
        """Every episode of `task`, by seed."""
        return sorted(self.task_folder(task).glob("seed_*.hdf5"))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other collections out. Raises ConfigurationError: one is writing here."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigurationError(f"another collection is writing to {self.path}: wait for it to end") from error
            yield

    def begin(self, settings: dict[str, Any]) -> None:
        """Opens the manifest, or makes it. Raises ConfigurationError: it has other settings, or cannot be read."""
        settings = json.loads(json.dumps(settings))
        if self.manifest_file.is_file():
            try:
                self.manifest = json.loads(self.manifest_file.read_text(encoding="utf-8"))
                have = self.manifest["settings"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigurationError(f"{self.manifest_file} is no manifest of demonstrations: {error}") from error
            for name in sorted(set(have) | set(settings)):
                if have.get(name) != settings.get(name):
                    raise ConfigurationError(
                        f"{self.path} was collected with {name} {have.get(name)!r}, not {settings.get(name)!r}: "
                        "collect into another folder"
                    )
        else:
            self.manifest = {"format": FORMAT, "suite": self.suite, "settings": settings, "tasks": {}}
        self.manifest["provenance"] = provenance()
        self._write()

    def _entry(self, task: int) -> dict[str, Any]:
        spec = find_task(self.suite, task)
        entry = {"name": spec.name, "instruction": spec.language, "demonstrations": 0, "frames": 0}
        return self.manifest["tasks"].setdefault(str(task), {**entry, "failures": {}, "errors": {}})

    def finished(self, task: int) -> set[int]:
        """Seeds of `task` that need no more work: kept, or failed. Makes the folder for its episodes."""
        self.task_folder(task).mkdir(exist_ok=True)
        kept = {int(path.stem.removeprefix("seed_")) for path in self.episodes(task)}
        return kept | {int(seed) for seed in self._entry(task)["failures"]}

    def record(self, attempt: Any) -> None:
        """Takes note of an episode (`sim.collect.Attempt`) that left no file, or clears an earlier error."""
        entry, seed = self._entry(attempt.task), str(attempt.seed)
        changed = entry["errors"].pop(seed, None) is not None
        if attempt.outcome == "error":
            entry["errors"][seed] = attempt.error
        elif not attempt.kept:
            entry["failures"][seed] = attempt.steps
        elif not changed:
            return
        self._write()

    def summarise(self, tasks: Iterable[int]) -> None:
        """Counts what is there and writes LIBERO's file of each task. Raises PolicyError: a damaged episode."""
        for task in tasks:
            entry, paths = self._entry(task), self.episodes(task)
            lengths = [_steps(path) for path in paths]
            entry["demonstrations"], entry["frames"] = len(paths), sum(lengths)
            if paths:
                _link(self.path / f"{entry['name']}_demo.hdf5", find_task(self.suite, task), paths, sum(lengths))
        self._write()

    def _write(self) -> None:
        write_atomically(self.manifest_file, (json.dumps(self.manifest, indent=1) + "\n").encode())


def _steps(path: Path) -> int:
    try:
        with h5py.File(path, "r") as file:
            return int(file["data"].attrs["total"])
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise PolicyError(f"{path} is damaged or no demonstration: {error}; delete it and collect it again") from error


def _link(path: Path, task: TaskSpec, episodes: list[Path], total: int) -> None:
    """LIBERO's file of a task, whose demonstrations are links that hold as long as the folder moves as a whole."""
    with h5py.File(episodes[0], "r") as file:
        env_args = json.loads(file["data"].attrs["env_args"])
    temporary = path.with_name(f".{path.name}.tmp")
    with h5py.File(temporary, "w") as file:
        data = file.create_group("data")
        data.attrs.update(layout_attributes(task.suite, task.language, env_args, demos=len(episodes), total=total))
        for number, episode in enumerate(episodes):
            data[f"demo_{number}"] = h5py.ExternalLink(str(episode.relative_to(path.parent)), "/data/demo_0")
    temporary.replace(path)
