"""One supervised run of the LIBERO graph from a program: start the nodes, follow the episode, stop the nodes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions

from flashvla_ros.graph import environment, graph
from flashvla_ros.monitor import EpisodeMonitor, Outcome
from flashvla_ros.processes import ProcessGroup
from flashvla_ros.recorder import LIBERO_CAMERAS, LIBERO_TOPICS, Recorder


@contextlib.contextmanager
def ros_context() -> Iterator[None]:
    """This process takes part in ROS, with the same transport profile as the nodes, on this machine only unless the
    environment says otherwise."""
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    os.environ.update(environment())
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    try:
        yield
    finally:
        rclpy.try_shutdown()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends the block like SIGINT does, by KeyboardInterrupt, so that everything that was started is stopped."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Session:
    """What a run of the LIBERO graph showed."""

    def __init__(self, monitor: EpisodeMonitor, recorder: Recorder | None) -> None:
        self.monitor, self.recorder = monitor, recorder
        self.lines: list[str] = []
        self.ended: dict[str, int] = {}

    def outcome(self) -> Outcome:
        """The bridge's outcome; an error when a node ended before there was one."""
        if self.monitor.outcome is not None:
            return self.monitor.outcome
        nodes = ", ".join(f"{name} (exit status {status})" for name, status in self.ended.items())
        log = "\n".join(self.lines[-20:])
        return Outcome("error", {"error": f"no outcome; ended by itself: {nodes or 'no node'}\n{log}"})


def run_episode(
    overrides: Mapping[str, Mapping[str, Any]],
    *,
    record_to: Path | None = None,
    on_progress: Callable[[EpisodeMonitor], None] = lambda _: None,
    limit: float = 600.0,
) -> Session:
    """Runs one episode of the `libero` graph and stops every node again.

    overrides: node name -> {parameter: value}. record_to: folder for the bag and the video, None = no recording.
    limit: s; an episode that takes longer is an error. Call within `ros_context`.
    """
    receivers = 3 if record_to else 2
    overrides = {**overrides, "sim_bridge": {"receivers": receivers, **overrides.get("sim_bridge", {})}}
    specs = graph("libero", overrides)
    executor = SingleThreadedExecutor()
    recorder = Recorder(record_to, LIBERO_TOPICS, LIBERO_CAMERAS) if record_to else None
    monitor = EpisodeMonitor()
    session = Session(monitor, recorder)
    nodes = [monitor, *([recorder] if recorder else [])]
    for node in nodes:
        executor.add_node(node)
    end = time.monotonic() + limit
    try:
        with ProcessGroup(specs, on_line=lambda name, line: session.lines.append(f"[{name}] {line}")) as group:
            while monitor.outcome is None and not session.ended and time.monotonic() < end:
                executor.spin_once(timeout_sec=0.1)
                session.ended = group.ended()
                on_progress(monitor)
            settle = time.monotonic() + 1.0  # what was sent before the outcome is still on its way
            while time.monotonic() < settle:
                executor.spin_once(timeout_sec=0.1)
    finally:
        if recorder is not None:
            recorder.close()
        for node in nodes:
            node.destroy_node()
    return session
