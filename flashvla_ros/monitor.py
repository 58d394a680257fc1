"""Follows an episode of the LIBERO graph from outside: how it ends, and what every step cost where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node

from flashvla_ros.diagnostics import values_of
from flashvla_ros.messages import stamp_ns
from flashvla_ros.qos import LATCHED, RELIABLE

STEP_TOPICS = ("/sim_bridge/step", "/policy/step", "/command_gate/decision")
OUTCOME_TOPIC = "/sim_bridge/outcome"


@dataclass
class Outcome:
    """How an episode ended: success, failure or error, and the bridge's facts about it."""

    outcome: str
    facts: Mapping[str, str] = field(default_factory=dict)


class EpisodeMonitor(Node):
    """Collects the timing of every step by its stamp, until the outcome comes."""

    def __init__(self, **options: Any) -> None:
        super().__init__("episode_monitor", start_parameter_services=False, enable_rosout=False, **options)
        self.steps: dict[int, dict[str, float]] = {}
        self.gate_verdicts: dict[int, str] = {}
        self.outcome: Outcome | None = None
        for topic in STEP_TOPICS:
            self.create_subscription(DiagnosticArray, topic, self._on_step, RELIABLE)
        self.create_subscription(DiagnosticArray, OUTCOME_TOPIC, self._on_outcome, LATCHED)

    def _on_step(self, message: DiagnosticArray) -> None:
        stamp, entry = stamp_ns(message.header.stamp), message.status[0]
        timing = self.steps.setdefault(stamp, {})
        timing.update({k: float(v) for k, v in values_of(entry).items() if k.endswith("_ms")})
        if "gate_ms" in timing and entry.name.endswith("command_gate"):
            self.gate_verdicts[stamp] = entry.message

    def _on_outcome(self, message: DiagnosticArray) -> None:
        self.outcome = Outcome(message.status[0].message, values_of(message.status[0]))

    def stepped(self) -> int:
        """Steps that the simulator has made."""
        return sum("answer_ms" in timing for timing in self.steps.values())

    def table(self) -> dict[str, np.ndarray]:
        """Milliseconds of each stage, (T,), over the steps that every node reported.

        physics, render: the simulator. policy: the policy's own computing. gate: the gate's.
        transport: the rest between publishing an observation and having its command, that is ROS 2 itself.
        """
        needed = ("answer_ms", "act_ms", "read_ms", "gate_ms", "physics_ms", "render_ms")
        rows = [t for _, t in sorted(self.steps.items()) if all(key in t for key in needed)]
        column = {key: np.array([t[key] for t in rows]) for key in needed}
        return {
            "physics": column["physics_ms"],
            "render": column["render_ms"],
            "policy": column["act_ms"],
            "gate": column["gate_ms"],
            "transport": column["answer_ms"] - column["act_ms"] - column["gate_ms"],
            "step": column["answer_ms"] + column["physics_ms"] + column["render_ms"],
        }


def percentiles(milliseconds: np.ndarray) -> dict[str, float]:
    """p50, p99 and maximum, rounded to a microsecond."""
    if not len(milliseconds):
        return {"p50": float("nan"), "p99": float("nan"), "max": float("nan")}
    p50, p99 = np.percentile(milliseconds, (50, 99))
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3), "max": round(float(milliseconds.max()), 3)}
