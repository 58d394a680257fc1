"""What the tests of several packages share: made-up demonstrations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mllm.demonstrations import Demonstration


@pytest.fixture
def make_demonstration() -> Callable[..., Demonstration]:
    """make(steps, seed, size, **fields): random numbers, and images that differ in every quarter and frame."""
    return _make


def _make(steps: int = 5, seed: int = 0, size: int = 16, **changes: object) -> Demonstration:
    rng = np.random.default_rng(seed)
    quaternion = rng.normal(size=(steps, 4))
    smooth = rng.integers(0, 256, (steps, 2, 2, 3)).repeat(size // 2, 1).repeat(size // 2, 2).astype(np.uint8)
    demonstration = Demonstration(
        images={"agentview": smooth, "robot0_eye_in_hand": smooth[:, ::-1].copy()},
        proprio={
            "eef_pos": rng.normal(size=(steps, 3)),
            "eef_quat": quaternion / np.linalg.norm(quaternion, axis=1, keepdims=True),
            "gripper_qpos": rng.normal(size=(steps, 2)),
            "joint_pos": rng.normal(size=(steps, 7)),
        },
        actions=rng.uniform(-1, 1, (steps, 7)),
        executed=rng.uniform(-1, 1, (steps, 7)),
        states=rng.normal(size=(steps, 30)),
        targets=rng.normal(size=(steps, 6)).astype(np.float32),
        phases=(np.arange(steps) % 3).astype(np.int8),
        phase_names=("approach", "close", "lost"),
        instruction="put the bowl on the plate",
        suite="libero_goal",
        task=8,
        seed=seed,
        outcome="success",
        source="expert",
        env_args={"problem_name": "libero_tabletop_manipulation", "bddl_file": "libero_goal/x.bddl"},
        provenance={"mujoco": "3.3.2"},
    )
    return replace(demonstration, **changes)  # type: ignore[arg-type]
