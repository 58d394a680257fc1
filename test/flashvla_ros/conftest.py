"""Real ROS 2 for the tests: a domain of their own on this machine, a probe that waits for events, never for time."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from flashvla_ros.graph import environment, graph
from flashvla_ros.processes import ProcessGroup

# Domains 1 to 100 are free of port clashes on Linux; parallel test runs start at different ones.
_domains = itertools.cycle(range(1, 101))
for _ in range(os.getpid() % 100):
    next(_domains)


class Probe:
    """A node of the test's own, with everything it heard in order of arrival."""

    def __init__(self) -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context, signal_handler_options=SignalHandlerOptions.NO)
        self.node = Node("probe", context=self.context)
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)
        self.heard: dict[str, list[Any]] = {}

    def add(self, node: Node) -> None:
        """Serves another node of this process too."""
        self._executor.add_node(node)

    def listen(self, kind: type, topic: str, qos: Any = 100) -> list[Any]:
        """Everything published on `topic` from now on, in the list that is returned."""
        messages = self.heard.setdefault(topic, [])
        self.node.create_subscription(kind, topic, messages.append, qos)
        return messages

    def wait(self, condition: Callable[[], Any], limit: float = 30.0, what: str = "") -> Any:
        """Serves callbacks until `condition` is true; fails after `limit` s."""
        end = time.monotonic() + limit
        while not (result := condition()):
            assert time.monotonic() < end, f"waited {limit} s in vain {what}"
            self._executor.spin_once(timeout_sec=0.02)
        return result

    def drain(self) -> None:
        """Serves what has already arrived."""
        for _ in range(50):
            self._executor.spin_once(timeout_sec=0.0)

    def connected(self, publisher: Any, count: int = 1) -> None:
        self.wait(lambda: publisher.get_subscription_count() >= count, what=f"for a subscriber of {publisher.topic}")

    def call(self, kind: type, name: str, request: Any, limit: float = 30.0) -> Any:
        """The answer of a service. A server may answer before it has found the client, and its answer is lost: then it
        is asked again.
        """
        client = self.node.create_client(kind, name)
        self.wait(client.service_is_ready, limit, f"for service {name}")
        asked: list[Any] = []
        again = 0.0

        def answered() -> Any:
            nonlocal again
            if time.monotonic() >= again:
                asked.append(client.call_async(request))
                again = time.monotonic() + limit / 3
            return next((future for future in asked if future.done()), None)

        answer = self.wait(answered, limit, f"for an answer of {name}")
        self.node.destroy_client(client)
        return answer.result()

    def close(self) -> None:
        self.node.destroy_node()
        self._executor.shutdown()
        self.context.try_shutdown()


@pytest.fixture
def ros_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", str(next(_domains)))
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def ros(ros_environment: None) -> Iterator[Probe]:
    probe = Probe()
    yield probe
    probe.close()


class Nodes:
    """Node processes of a test; all are stopped with it."""

    def __init__(self) -> None:
        self._groups: list[ProcessGroup] = []
        self.lines: list[str] = []

    def start(self, graph_name: str, only: tuple[str, ...] = (), **overrides: dict[str, Any]) -> ProcessGroup:
        """Starts the nodes of a graph (or `only` some) with parameter overrides by node."""
        specs = [spec for spec in graph(graph_name, overrides) if not only or spec.name in only]
        group = ProcessGroup(specs, on_line=lambda name, line: self.lines.append(f"[{name}] {line}"))
        self._groups.append(group)
        return group

    def output(self) -> str:
        return "\n".join(self.lines)

    def stop(self) -> None:
        for group in self._groups:
            group.stop()


@pytest.fixture
def nodes(ros_environment: None) -> Iterator[Nodes]:
    started = Nodes()
    yield started
    started.stop()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs policies of somebody else's, as pip would: source of a module, and entry point -> class in it."""

    def done(source: str, **policies: str) -> None:
        (tmp_path / "third_party.py").write_text(source)
        info = tmp_path / "third_party-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
        entries = [f"{name} = third_party:{kind}" for name, kind in policies.items()]
        (info / "entry_points.txt").write_text("\n".join(["[flashvla.policies]", *entries, ""]))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    return done
