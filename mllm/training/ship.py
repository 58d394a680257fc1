"""From a run's folder to a checkpoint that others get, with how it came about beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from mllm.checkpoint import load_checkpoint, save_checkpoint, write_json
from mllm.errors import PolicyError
from mllm.training.state import read_facts

FILE = "training.json"
CURVES = "curves.png"


def ship(run: Path, out: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes the run's averaged weights to `out` in `dtype`, its curves, and `training.json`.

    Raises PolicyError: the run has no checkpoint.
    """
    model, tokenizer = load_checkpoint(run / "checkpoint", dtype=dtype)
    save_checkpoint(out, model, tokenizer)
    write_json(out / FILE, {"runs": history(run)})
    if (run / CURVES).is_file():
        shutil.copyfile(run / CURVES, out / CURVES)


def history(run: Path) -> list[dict[str, Any]]:
    """The run and those it started from, the first one first: configuration, steps, and what it learned from.

    What a shipped checkpoint came from is written beside it. Raises PolicyError: a run has no state, or one that
    does not say what it learned from.
    """
    facts = read_facts(run)
    if facts is None:
        raise PolicyError(f"{run} is no run: it has no state")
    if "learned" not in facts:
        raise PolicyError(f"{run} was trained before states said what a run learned from: train it again")
    config = facts["config"]
    before: list[dict[str, Any]] = []
    if config["init"]:
        start = Path(config["init"])
        before = history(start.parent) if read_facts(start.parent) else read_history(start)
    # Folders say nothing to anybody else.
    told = {key: value for key, value in config.items() if key not in ("data", "init", "name")}
    started = before[-1]["name"] if before else Path(config["init"]).parent.name
    named = {"name": config["name"], "init": started, "step": facts["step"], "demonstrations": facts["learned"]}
    return [*before, {**named, **told}]


def read_history(checkpoint: Path) -> list[dict[str, Any]]:
    """What `ship` wrote beside a checkpoint; empty where there is nothing."""
    path = checkpoint / FILE
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
