"""Runs that take a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

CHUNKED = {"decoding": "slots", "chunk": 4, "head": "regression", "execute": 2, "proprio": ["eef_pos", "gripper_qpos"]}


@pytest.fixture
def settings(demonstrations: Path, tiny: Path) -> dict[str, Any]:
    """Fields of a `TrainConfig` whose runs take a second."""
    return {
        "name": "run",
        "data": [str(demonstrations)],
        "init": str(tiny),
        "change": CHUNKED,
        "steps": 12,
        "batch": 8,
        "warmup": 2,
        "ema": 0.5,
        "shift": 1,
        "validation": 0.2,
        "threads": 1,
        "precision": "float32",
    }
