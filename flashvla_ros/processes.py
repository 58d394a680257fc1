"""Node processes: started together, watched, and always stopped, even when this process is killed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

from flashvla_ros.graph import NodeSpec, environment

GRACE = 8.0  # s from SIGINT to SIGTERM, and from SIGTERM to SIGKILL
PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """In the child, before it runs: the kernel sends it SIGTERM when the parent is gone (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """A handler that raises must not do so between the start of a process and the note that it was started.

    Python runs handlers in the main thread, whichever thread the kernel chose, so that a signal mask holds nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    came: list[int] = []
    before = {wanted: signal.signal(wanted, lambda number, _: came.append(number)) for wanted in numbers}
    try:
        yield
    finally:
        for wanted, handler in before.items():
            signal.signal(wanted, handler)
    for number in came[:1]:
        signal.raise_signal(number)


def _print_line(name: str, line: str) -> None:
    sys.stderr.write(f"[{name}] {line}\n")


class ProcessGroup:
    """The processes of a graph. Use as a context manager: leaving it stops all, last started first."""

    def __init__(
        self,
        specs: Sequence[NodeSpec],
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str, str], None] = _print_line,
    ) -> None:
        self._on_line = on_line
        self._readers: list[threading.Thread] = []
        self.processes: dict[str, subprocess.Popen[str]] = {}
        child_env = environment(env) | {
            "PYTHONUNBUFFERED": "1",
            "RCUTILS_LOGGING_BUFFERED_STREAM": "1",
            "RCUTILS_CONSOLE_OUTPUT_FORMAT": "{severity} {message}",
        }
        try:
            for spec in specs:
                with _signals_held():
                    self.processes[spec.name] = process = subprocess.Popen(
                        spec.command(),
                        env=child_env,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        text=True,
                        errors="replace",
                        start_new_session=True,
                        preexec_fn=_die_with_parent,
                    )
                reader = threading.Thread(target=self._read, args=(spec.name, process.stdout), daemon=True)
                reader.start()
                self._readers.append(reader)
        except BaseException:
            self.stop()
            raise

    def _read(self, name: str, stream: IO[str]) -> None:
        for line in stream:
            self._on_line(name, line.rstrip())

    def ended(self) -> dict[str, int]:
        """Nodes that are no longer running: name -> exit status (negative: the signal that killed it)."""
        return {name: process.returncode for name, process in self.processes.items() if process.poll() is not None}

    def stop(self) -> dict[str, int]:
        """Stops every node, the last started first, each before the next is asked. Returns all exit statuses."""
        for process in reversed(self.processes.values()):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
                if process.poll() is not None:
                    break
                os.killpg(process.pid, number)
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    continue
        for reader in self._readers:
            reader.join(1.0)
        return {name: process.returncode for name, process in self.processes.items()}

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def run_until_ended(group: ProcessGroup, stop_requested: Callable[[], bool]) -> dict[str, int]:
    """Waits until a node ends or `stop_requested`. Returns the nodes that ended by themselves."""
    while not stop_requested():
        ended = group.ended()
        if ended:
            return ended
        time.sleep(0.1)
    return {}
