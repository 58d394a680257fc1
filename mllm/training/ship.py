"""From a run's folder to a checkpoint that others get, with how it came about beside it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mllm.checkpoint import load_checkpoint, save_checkpoint, write_json
from mllm.demonstrations import read_demonstration
from mllm.errors import PolicyError
from mllm.training.data import find_demonstrations, source_of
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


def history(run: Path, known: dict[Path, tuple[str, str]] | None = None) -> list[dict[str, Any]]:
    """The run and those it started from, the first one first: configuration, steps, and what it learned from.

    What a shipped checkpoint came from is written beside it.
    known: suite and source of demonstrations that were read before, to which others are added.
    """
    known = {} if known is None else known
    facts = read_facts(run)
    if facts is None:
        raise PolicyError(f"{run} is no run: it has no state")
    config = facts["config"]
    before: list[dict[str, Any]] = []
    if config["init"]:
        start = Path(config["init"])
        before = history(start.parent, known) if read_facts(start.parent) else read_history(start)
    learned = facts["learned"] if "learned" in facts else _count(config["data"], known)
    # Folders say nothing to anybody else.
    told = {key: value for key, value in config.items() if key not in ("data", "init", "name")}
    started = before[-1]["name"] if before else Path(config["init"]).parent.name
    named = {"name": config["name"], "init": started, "step": facts["step"], "demonstrations": learned}
    return [*before, {**named, **told}]


def _count(folders: Sequence[str], known: dict[Path, tuple[str, str]]) -> list[dict[str, Any]]:
    """What the state of an older version does not say: the episodes in the folders now, held out or not."""
    paths = find_demonstrations(list(dict.fromkeys(folders)))
    for path in paths:
        if path not in known:
            demo = read_demonstration(path)
            known[path] = demo.suite, source_of(demo)
    counted = Counter(known[path] for path in paths)
    return [{"suite": suite, "source": source, "episodes": count} for (suite, source), count in sorted(counted.items())]


def read_history(checkpoint: Path) -> list[dict[str, Any]]:
    """What `ship` wrote beside a checkpoint; empty where there is nothing."""
    path = checkpoint / FILE
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
