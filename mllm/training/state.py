"""Where a run stands, on disk: enough to go on as if nothing had happened. Safetensors and JSON, nothing pickled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mllm.errors import PolicyError

FILE = "state.safetensors"


def save_state(
    folder: Path, learner: nn.Module, average: nn.Module, optimisers: list[torch.optim.Optimizer], facts: dict[str, Any]
) -> None:
    """Replaces the state in `folder`; a kill or a full disk leaves the old one.

    facts: what else is to be found again, such as the step; must be JSON. Raises OSError: it cannot be written.
    """
    tensors = {f"learner.{name}": value for name, value in learner.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    for number, optimiser in enumerate(optimisers):
        for index, values in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{index}.{name}": value for name, value in values.items()}
    temporary = folder / f".{FILE}.tmp"
    try:
        save_file(
            {name: value.contiguous() for name, value in tensors.items()}, temporary, {"facts": json.dumps(facts)}
        )
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(folder / FILE)
    except SafetensorError as error:
        raise OSError(f"{folder / FILE} was not written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_facts(folder: Path) -> dict[str, Any] | None:
    """The facts of the state in `folder`; None where there is none. Raises PolicyError: it is damaged."""
    if not (folder / FILE).is_file():
        return None
    try:
        with safe_open(folder / FILE, "pt") as file:
            return json.loads(file.metadata()["facts"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise PolicyError(f"{folder / FILE} is damaged: {error}; delete it to start this run again") from error


def load_state(
    folder: Path, learner: nn.Module, average: nn.Module, optimisers: list[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Fills modules and optimisers from the state in `folder`; returns its facts. Raises PolicyError: no fit."""
    facts = read_facts(folder)
    if facts is None:
        raise PolicyError(f"there is no {folder / FILE}")
    parts: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(folder / FILE, "pt") as file:
            for name in file.keys():  # noqa: SIM118, safe_open is no mapping
                kind, _, rest = name.partition(".")
                parts.setdefault(kind, {})[rest] = file.get_tensor(name)
        learner.load_state_dict(parts.get("learner", {}))
        average.load_state_dict(parts.get("average", {}))
        for number, optimiser in enumerate(optimisers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in parts.get("optimiser", {}).items():
                owner, index, key = name.split(".", 2)
                if int(owner) == number:
                    state.setdefault(int(index), {})[key] = value
            optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise PolicyError(f"{folder / FILE} does not fit this run: {error}") from error
    return facts
