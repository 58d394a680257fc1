"""What happened in one episode of the bridge, step by step, as one .npz file: to compare runs number by number."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sim.env import EnvConfig
from sim.tasks import TaskSpec


@dataclass
class Trace:
    """states: (T + 1, dim) float64, simulator states; actions: (T, 7) float32; timing: stage -> (T,) seconds."""

    config: EnvConfig
    task: TaskSpec
    init_state: int | str
    mode: str
    states: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    timing: list[dict[str, float]] = field(default_factory=list)

    def begin(self, state: np.ndarray) -> None:
        self.states.append(state)

    def add(self, action: np.ndarray, state: np.ndarray, timing: dict[str, float]) -> None:
        self.actions.append(action)
        self.states.append(state)
        self.timing.append(timing)

    def save(self, path: Path, outcome: str, error: str) -> None:
        """Writes the file in one move, so that a reader never sees half of it."""
        header = {
            "outcome": outcome,
            "error": error,
            "mode": self.mode,
            "init_state": self.init_state,
            "instruction": self.task.language,
            **asdict(self.config),
        }
        arrays: dict[str, Any] = {
            f"timing_{name}": [t[name] for t in self.timing] for name in (self.timing[0] if self.timing else ())
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with part.open("wb") as file:
            np.savez(
                file,
                states=np.array(self.states),
                actions=np.array(self.actions, np.float32).reshape(-1, 7),
                header=np.array(json.dumps(header)),
                **arrays,
            )
        os.replace(part, path)
