"""What a node tells about itself: latency statistics and `/diagnostics`."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock, ClockType
from rclpy.node import Node

Report = tuple[bytes, str, Mapping[str, Any]]  # level, message, values

OK, WARN, ERROR, STALE = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR, DiagnosticStatus.STALE


class Window:
    """The newest `size` measurements of one quantity, in seconds."""

    def __init__(self, size: int = 200) -> None:
        self._values: deque[float] = deque(maxlen=size)

    def add(self, seconds: float) -> None:
        self._values.append(seconds)

    def percentile_ms(self, percent: float) -> float:
        """In milliseconds; NaN before the first measurement."""
        return float(np.percentile(self._values, percent)) * 1e3 if self._values else float("nan")

    def summary(self, name: str) -> dict[str, str]:
        """p50 and p99 as diagnostic values."""
        return {f"{name}_p50_ms": f"{self.percentile_ms(50):.2f}", f"{name}_p99_ms": f"{self.percentile_ms(99):.2f}"}


def status(name: str, level: bytes, message: str, values: Mapping[str, Any]) -> DiagnosticStatus:
    """One diagnostic status; values become strings."""
    return DiagnosticStatus(
        name=name, level=level, message=message, values=[KeyValue(key=k, value=str(v)) for k, v in values.items()]
    )


def status_array(stamp: Time, *statuses: DiagnosticStatus) -> DiagnosticArray:
    message = DiagnosticArray(status=list(statuses))
    message.header.stamp = stamp
    return message


def values_of(diagnostic: DiagnosticStatus) -> dict[str, str]:
    """The key-value pairs of a status."""
    return {pair.key: pair.value for pair in diagnostic.values}


def steady_timer(node: Node, period: float, callback: Callable[[], None]) -> Any:
    """A timer on the machine's steady clock: it also runs while simulated time stands still. period: s."""
    return node.create_timer(period, callback, clock=Clock(clock_type=ClockType.STEADY_TIME))


class Diagnostics:
    """Publishes a node's status on /diagnostics, at a rate and at once when its level changes.

    report: returns (level, message, values) of now. period: s.
    """

    def __init__(self, node: Node, report: Callable[[], Report], period: float = 1.0) -> None:
        self._node, self._report = node, report
        self._name = node.get_fully_qualified_name().lstrip("/")
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        steady_timer(node, period, self.publish)

    def publish(self) -> None:
        level, message, values = self._report()
        stamp = self._node.get_clock().now().to_msg()
        self._publisher.publish(status_array(stamp, status(self._name, level, message, values)))


def describe(error: BaseException) -> str:
    """An exception with its traceback, for a log."""
    return "".join(traceback.format_exception(error)).rstrip()
