"""Recorded actions of one episode, in a safetensors file: what a policy commanded, and in which episode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mllm.errors import PolicyError

MAX_STEPS = 100_000
MAX_METADATA = 64 * 1024
# 7 float32 a step, the metadata, and room for the header around them.
MAX_BYTES = MAX_STEPS * 7 * 4 + MAX_METADATA + 4096


@dataclass(frozen=True)
class Recording:
    """Actions in the order in which they were commanded.

    actions: (T, 7) float32 in [-1, 1], T from 1 to `MAX_STEPS`; see `mllm.policy.ActionSpec`.
    metadata: anything that names the episode (suite, task, init_state, versions), text to text.
    """

    actions: np.ndarray
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        actions = self.actions
        if not isinstance(actions, np.ndarray) or actions.dtype != np.float32:
            raise PolicyError(f"recorded actions are {getattr(actions, 'dtype', type(actions))}: they must be float32")
        if actions.ndim != 2 or actions.shape[1] != 7 or not 1 <= len(actions) <= MAX_STEPS:
            raise PolicyError(f"recorded actions have shape {actions.shape}: it must be (1 to {MAX_STEPS}, 7)")
        within = np.abs(actions) <= 1.0  # also false for NaN
        if not within.all():
            row, column = np.argwhere(~within)[0]
            raise PolicyError(
                f"recorded action {row}, number {column}, is {actions[row, column]}: it must be in [-1, 1]"
            )
        for key, value in self.metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise PolicyError(f"recording metadata {key!r}: {value!r} must be text to text")
        size = sum(len(key.encode()) + len(value.encode()) for key, value in self.metadata.items())
        if size > MAX_METADATA:
            raise PolicyError(f"recording metadata takes {size} bytes: at most {MAX_METADATA} are allowed")


def save_recording(path: str | Path, recording: Recording) -> None:
    """Writes `recording` to `path`, replacing what is there. Raises OSError where the file cannot be written."""
    from safetensors.numpy import save

    tensors = {"actions": np.ascontiguousarray(recording.actions)}
    Path(path).write_bytes(save(tensors, metadata=dict(recording.metadata)))


def load_recording(path: str | Path) -> Recording:
    """Reads what `save_recording` wrote; nothing in the file is executed.

    Raises PolicyError: no such file, too large, not safetensors, or not a valid `Recording`.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise PolicyError(f"there is no recording at {path}")
    if path.stat().st_size > MAX_BYTES:
        raise PolicyError(f"{path} has {path.stat().st_size} bytes: a recording has at most {MAX_BYTES}")
    try:
        with safe_open(path, framework="numpy") as file:
            names = sorted(file.keys())
            if names != ["actions"]:
                raise PolicyError(f"{path} holds {', '.join(names) or 'nothing'}: a recording holds 'actions' alone")
            actions, metadata = file.get_tensor("actions"), dict(file.metadata() or {})
    except SafetensorError as error:
        raise PolicyError(f"{path} is not a safetensors file ({error})") from error
    try:
        return Recording(actions, metadata)
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from error
