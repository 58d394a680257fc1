"""A folder of demonstrations: where each episode lies, what was tried, and LIBERO's view of it.

- `<suite>/<task name>/seed_00000042.hdf5`: an episode, see `mllm.demonstrations`
- `<suite>/<task name>_demo.hdf5`: LIBERO's file of the task, whose `data/demo_i` are links into the episodes
- `<suite>/manifest.json`: versions, settings, counts of each task, failures and errors by seed
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from mllm.demonstrations import layout_attributes, write_atomically
from mllm.errors import PolicyError
from sim.errors import ConfigurationError
from sim.tasks import find_task
from sim.versions import provenance

FORMAT = 1


@dataclass(frozen=True)
class Attempt:
    """How one episode ended.

    outcome: "success", "failure", "cut" or "error", which has a traceback in `error`.  steps: control steps taken.
    kept: whether its file was written.
    """

    task: int
    seed: int
    outcome: str
    steps: int = 0
    kept: bool = False
    error: str = ""


class SuiteFolder:
    """The demonstrations of one suite under `root`."""

    def __init__(self, root: Path, suite: str) -> None:
        self.suite = suite
        self.path = Path(root) / suite
        self.manifest_file = self.path / "manifest.json"
        self._manifest: dict[str, Any] = {}
        self._steps: dict[int, dict[int, int]] = {}  # task -> seed -> steps, of what is kept

    def episode(self, task: int, seed: int) -> Path:
        """Where an episode lies, or would."""
        return self.path / find_task(self.suite, task).name / f"seed_{seed:08d}.hdf5"

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

    def begin(self, settings: dict[str, Any], tasks: Iterable[int]) -> None:
        """Opens the folder for episodes of `tasks`, or makes it.

        Raises ConfigurationError: it was made with other settings, or its manifest cannot be read.
        Raises PolicyError: a damaged episode.
        """
        settings = json.loads(json.dumps(settings))
        self._manifest = {"format": FORMAT, "suite": self.suite, "settings": settings, "tasks": {}}
        if self.manifest_file.is_file():
            self._manifest = self._read_manifest(settings)
        self._manifest["provenance"] = provenance()
        for left_by_a_kill in self.path.glob("**/.*.tmp"):
            left_by_a_kill.unlink()
        for task in tasks:
            spec = find_task(self.suite, task)
            named = {"name": spec.name, "instruction": spec.language, "demonstrations": 0, "frames": 0}
            self._manifest["tasks"].setdefault(str(task), {**named, "failures": {}, "errors": {}})
            episodes = self.path / spec.name
            episodes.mkdir(parents=True, exist_ok=True)
            self._steps[task] = {_seed(path): _count_steps(path) for path in sorted(episodes.glob("seed_*.hdf5"))}
        self._write()

    def _read_manifest(self, settings: dict[str, Any]) -> dict[str, Any]:
        try:
            manifest = json.loads(self.manifest_file.read_text(encoding="utf-8"))
            have = manifest["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{self.manifest_file} is no manifest of demonstrations: {error}") from error
        for name in sorted(set(have) | set(settings)):
            if have.get(name) != settings.get(name):
                raise ConfigurationError(
                    f"{self.path} was collected with {name} {have.get(name)!r}, not {settings.get(name)!r}: "
                    "collect into another folder"
                )
        return manifest

    def finished(self, task: int, seed: int) -> bool:
        """Whether an episode needs no more work: it is kept, or is known to fail."""
        return seed in self._steps[task] or str(seed) in self._manifest["tasks"][str(task)]["failures"]

    def record(self, attempt: Attempt) -> None:
        """Takes note of an episode. What a kill would lose is only what was not tried, or left a file."""
        entry, seed = self._manifest["tasks"][str(attempt.task)], str(attempt.seed)
        forgiven = entry["errors"].pop(seed, None) is not None
        if attempt.kept:
            self._steps[attempt.task][attempt.seed] = attempt.steps
        elif attempt.outcome == "error":
            entry["errors"][seed] = attempt.error
        else:
            entry["failures"][seed] = attempt.steps
        if forgiven or not attempt.kept:
            self._write()

    def summarise(self) -> None:
        """Writes the counts, and LIBERO's file of each task that has demonstrations. It has room for one instruction:
        shuffled episodes have none.
        """
        for task, kept in self._steps.items():
            entry = self._manifest["tasks"][str(task)]
            entry["demonstrations"], entry["frames"] = len(kept), sum(kept.values())
            if kept and self._manifest["settings"].get("draw") != "shuffled":
                self._link(task, sorted(kept), entry["frames"])
        self._write()

    def _link(self, task: int, seeds: list[int], frames: int) -> None:
        """The links hold as long as the folder moves as a whole."""
        spec = find_task(self.suite, task)
        episodes = [self.episode(task, seed) for seed in seeds]
        with h5py.File(episodes[0], "r") as file:
            env_args = json.loads(file["data"].attrs["env_args"])
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            data = file.create_group("data")
            data.attrs.update(layout_attributes(self.suite, spec.language, env_args, demos=len(seeds), total=frames))
            for number, episode in enumerate(episodes):
                data[f"demo_{number}"] = h5py.ExternalLink(str(episode.relative_to(self.path)), "/data/demo_0")
        write_atomically(self.path / f"{spec.name}_demo.hdf5", buffer.getvalue())

    def _write(self) -> None:
        write_atomically(self.manifest_file, (json.dumps(self._manifest, indent=1) + "\n").encode())


def _seed(path: Path) -> int:
    return int(path.stem.removeprefix("seed_"))


def _count_steps(path: Path) -> int:
    try:
        with h5py.File(path, "r") as file:
            return int(file["data/demo_0"].attrs["num_samples"])
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise PolicyError(f"{path} is damaged or no demonstration: {error}; delete it and collect it again") from error
