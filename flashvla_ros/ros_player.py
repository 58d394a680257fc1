"""Episodes of an evaluation through the whole ROS graph in lockstep: real nodes, real messages, the gate between."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flashvla_ros.session import Session, run_episode
from sim.env import EnvConfig
from sim.evaluate import circumstances, now
from sim.results import EpisodeKey, EpisodeResult
from sim.tasks import asked, find_task

TOPICS = {"agentview": "agentview", "robot0_eye_in_hand": "wrist"}  # LIBERO's camera -> topic prefix
_NOT_PROVENANCE = ("suite", "task", "init_state", "mode", "error", "instruction", "steps")


def graph_overrides(
    env: EnvConfig, policy: str, options: Mapping[str, Any], key: EpisodeKey
) -> dict[str, dict[str, Any]]:
    """Parameters of the `libero` graph that make it play this episode."""
    topics = {camera: TOPICS.get(camera, camera) for camera in env.cameras}
    bridge = {
        "suite": key.suite,
        "task": str(key.task),
        "init_state": str(key.init_state),
        "seed": key.seed,
        "renderer": env.renderer,
        "stepper": env.stepper,
        "image_size": env.image_size,
        "settle_steps": env.settle_steps,
        "step_limit": env.step_limit or 0,
        "cameras": [f"{camera}={topic}" for camera, topic in topics.items()],
        "mode": "lockstep",
    }
    acting = {
        "policy": policy,
        "policy_options": json.dumps(dict(options)),
        "cameras": [f"{camera}={topic}/image_raw" for camera, topic in topics.items()],
    }
    return {"sim_bridge": bridge, "policy": acting}


def play_through_ros(env: EnvConfig, policy: str, options: Mapping[str, Any], key: EpisodeKey) -> EpisodeResult:
    """Starts the graph, plays one episode and stops the graph again. Call within `flashvla_ros.session.ros_context`.

    timing: "policy", "physics" and "render" as in a rollout; "gate" and "transport" are what ROS adds.
    """
    # The graph's processes start now: what is committed while they play is not what answers.
    started, made = now(), circumstances(workers=1, max_batch=1, executor="ros")
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.npz"
        overrides = graph_overrides(env, policy, options, key)
        overrides["sim_bridge"]["trace_file"] = str(trace)
        session = run_episode(overrides)
        actions = np.zeros((0, 7), np.float32)
        if trace.is_file():
            with np.load(trace, allow_pickle=False) as played:
                actions = played["actions"]
    outcome = session.outcome()
    facts = {name: value for name, value in outcome.facts.items() if name not in _NOT_PROVENANCE}
    return EpisodeResult(
        key=key,
        language=asked(find_task(key.suite, key.task), key.init_state, key.seed).language,
        outcome=outcome.outcome,
        steps=len(actions),
        started=started,
        finished=now(),
        actions=actions,
        timing=_timing(session, len(actions)),
        provenance={**facts, **made},
        error=(outcome.facts.get("error") or "the bridge gave no reason") if outcome.outcome == "error" else None,
    )


def _timing(session: Session, steps: int) -> dict[str, np.ndarray]:
    """Stage -> (steps,) s; NaN at the end where a node's report of a step was lost."""
    table = session.monitor.table()
    del table["step"]
    return {
        stage: np.pad(ms[:steps] / 1e3, (0, max(steps - len(ms), 0)), constant_values=np.nan)
        for stage, ms in table.items()
    }
