"""What a policy did in a recorded episode, step by step, from a rosbag2. Needs no ROS installation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.highlevel import AnyReader, AnyReaderError
from rosbags.typesys import Stores, get_typestore

from flashvla_ros.errors import ConfigurationError

STEP, TWIST, GRIPPER = "/policy/step", "/policy/command", "/policy/gripper_command"
DECISION, INSTRUCTION, OUTCOME = "/command_gate/decision", "/instruction", "/sim_bridge/outcome"


@dataclass(frozen=True)
class BagTrace:
    """T steps of a policy, in the order of their observations' stamps; NaN where nothing was reported.

    times: (T,) s since the first.  linear, angular: (T, 3) proposed, m/s and rad/s in the commands' frame.
    opening: (T,) m, of the gripper.  reused: (T,) bool.  reasons: T of `mllm.reuse.Reason`, "" where none was given.
    angle: (T,) degrees.  overlap: (T,).  surprise: (T,) grey levels.  latency: (T,) ms in the policy.
    corrected: (T,) bool, where the gate passed the command otherwise than proposed, or not.
    instruction, outcome: the last of the bag, "" without.
    """

    times: np.ndarray
    linear: np.ndarray
    angular: np.ndarray
    opening: np.ndarray
    reused: np.ndarray
    reasons: tuple[str, ...]
    angle: np.ndarray
    overlap: np.ndarray
    surprise: np.ndarray
    latency: np.ndarray
    corrected: np.ndarray
    instruction: str = ""
    outcome: str = ""


def read_bag(path: Path) -> BagTrace:
    """path: of a bag, or of a folder with one called "bag", such as `flashvla demo` writes.

    Raises ConfigurationError: there is no bag, it cannot be read, or no policy reports its steps in it.
    """
    folder = path / "bag" if (path / "bag").is_dir() else path
    messages: dict[str, dict[int, Any]] = {}
    words = {INSTRUCTION: "", OUTCOME: ""}
    try:
        with AnyReader([folder], default_typestore=get_typestore(Stores.ROS2_HUMBLE)) as bag:
            wanted = [c for c in bag.connections if c.topic in (STEP, TWIST, GRIPPER, DECISION, *words)]
            for connection, _, data in bag.messages(wanted) if wanted else ():
                message: Any = bag.deserialize(data, connection.msgtype)
                if connection.topic == INSTRUCTION:
                    words[INSTRUCTION] = message.data
                elif connection.topic == OUTCOME:
                    words[OUTCOME] = message.status[0].message
                else:
                    stamp = message.header.stamp
                    messages.setdefault(connection.topic, {})[stamp.sec * 10**9 + stamp.nanosec] = message
    except (AnyReaderError, OSError) as error:
        raise ConfigurationError(f"{folder} cannot be read as a rosbag2: {error}") from error
    if STEP not in messages:
        raise ConfigurationError(f"{folder} has no message on {STEP}: record that topic, and an episode with steps")
    return trace_of(messages, words[INSTRUCTION], words[OUTCOME])


def trace_of(messages: Mapping[str, Mapping[int, Any]], instruction: str = "", outcome: str = "") -> BagTrace:
    """messages: topic -> stamp in ns -> message; at least `STEP` is there."""
    stamps = sorted(messages[STEP])
    steps = [messages[STEP][stamp].status[0] for stamp in stamps]
    values = [{pair.key: pair.value for pair in step.values} for step in steps]
    twists, grippers, decisions = (messages.get(topic, {}) for topic in (TWIST, GRIPPER, DECISION))

    def column(name: str) -> np.ndarray:
        return np.array([float(found.get(name, "nan")) for found in values])

    def vectors(part: str) -> np.ndarray:
        found = [getattr(twists[stamp].twist, part) if stamp in twists else None for stamp in stamps]
        return np.array([[np.nan] * 3 if v is None else [v.x, v.y, v.z] for v in found])

    return BagTrace(
        times=np.array([(stamp - stamps[0]) * 1e-9 for stamp in stamps]),
        linear=vectors("linear"),
        angular=vectors("angular"),
        opening=np.array([grippers[stamp].position[0] if stamp in grippers else np.nan for stamp in stamps]),
        reused=np.array([step.message == "reused" for step in steps]),
        reasons=tuple(found.get("reuse_reason", "") for found in values),
        angle=column("reuse_angle"),
        overlap=column("reuse_overlap"),
        surprise=column("reuse_surprise"),
        latency=column("act_ms"),
        corrected=np.array(
            [any(s.message != "passed" for s in decisions[t].status) if t in decisions else False for t in stamps]
        ),
        instruction=instruction,
        outcome=outcome,
    )
