"""How every node process starts and ends: errors name themselves, signals lead to an orderly end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any

import rclpy
from rclpy.exceptions import NameValidationException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from flashvla_ros.errors import ConfigurationError
from mllm.errors import PolicyError

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


class StopRequested:
    """True once SIGINT or SIGTERM came. We handle signals ourselves: rclpy's handler would shut the context down, and
    a gate could no longer publish the last, safe command."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        self.signal = number

    def __bool__(self) -> bool:
        return self.signal is not None


def spin(node: Node, stop: StopRequested) -> None:
    """Serves callbacks until a signal comes."""
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    while not stop:
        executor.spin_once(timeout_sec=0.1)


def run_node(make: Callable[[], Any], loop: Callable[[Any, StopRequested], None] = spin) -> int:
    """Makes a node, runs `loop` until SIGINT or SIGTERM, then calls the node's `close`. Returns the exit status.

    A wrong parameter ends with status 2 and one line naming it, without a traceback.
    """
    rclpy.init(args=sys.argv, signal_handler_options=SignalHandlerOptions.NO)
    stop = StopRequested()
    node = None
    try:
        node = make()
        loop(node, stop)
    except (ConfigurationError, PolicyError, NameValidationException) as error:
        (node.get_logger() if node else rclpy.logging.get_logger("flashvla")).fatal(str(error))
        return EXIT_USAGE
    except ExternalShutdownException:
        pass
    finally:
        # `ros2 launch` and a terminal both deliver SIGINT: a second one must not interrupt the orderly end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if node is not None:
            node.close()
            node.destroy_node()
        rclpy.try_shutdown()
    return EXIT_OK
