"""Worker processes that share out jobs: one that crashes or hangs costs one job, and is replaced."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from mllm.errors import PolicyError
from sim.errors import ConfigurationError, EnvironmentFault, SimError

_PR_SET_PDEATHSIG = 1
_CLOSE_LIMIT = 5.0  # seconds
# One process is one worker: the libraries under it would each start as many threads as there are cores.
_SINGLE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS"), "1")


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    jobs: deque[Any] = field(default_factory=deque)
    since: float = 0.0


class Pool:
    """`workers` processes, each of which makes `module.name(*arguments)` and calls it with one job after another.

    limit: seconds in which a job must be answered; the process is killed after them.
    A process dies with the thread that started it.
    """

    def __init__(self, module: str, name: str, arguments: tuple[Any, ...], workers: int, limit: float) -> None:
        self._made = (module, name, arguments)
        self._count, self._limit = workers, limit
        self._workers: list[_Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.connection.close()  # an idle worker ends by itself, and cleans up
        for worker in self._workers:
            if worker.jobs:
                worker.process.kill()
            try:
                worker.process.wait(_CLOSE_LIMIT)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self._workers = []

    def run(self, units: Iterable[list[Any]]) -> Iterator[tuple[Any, Any]]:
        """Yields (job, answer) as answers come; the jobs of a unit are done one after the other by one worker.

        The answer to a job that its process did not survive is an EnvironmentFault that says how it ended.
        Raises ConfigurationError, PolicyError or OSError where a job did, and EnvironmentFault for anything else.
        """
        waiting = deque(unit for unit in units if unit)
        for _ in range(min(self._count, len(waiting))):
            self._workers.append(self._start())
        while True:
            for worker in self._workers:
                if not worker.jobs and waiting:
                    self._assign(worker, waiting.popleft())
            busy = {worker.connection: worker for worker in self._workers if worker.jobs}
            if not busy:
                return
            now = time.monotonic()
            left = min(worker.since + self._limit - now for worker in busy.values())
            for connection in wait(list(busy), max(left, 0.0)):
                worker = busy.pop(connection)  # type: ignore[call-overload]
                try:
                    kind, value = worker.connection.recv()
                except (EOFError, OSError):
                    yield self._replace(worker, waiting)
                    continue
                if kind != "value":
                    raise _error(kind, value)
                job = worker.jobs.popleft()
                worker.since = time.monotonic()
                yield job, value
            now = time.monotonic()
            for worker in busy.values():
                if now - worker.since > self._limit:
                    yield self._replace(worker, waiting)

    def _assign(self, worker: _Worker, unit: list[Any]) -> None:
        worker.jobs, worker.since = deque(unit), time.monotonic()
        # A process that has ended shows as the end of its answers.
        with contextlib.suppress(OSError):
            worker.connection.send(list(unit))

    def _replace(self, worker: _Worker, waiting: deque[list[Any]]) -> tuple[Any, EnvironmentFault]:
        """Ends a worker, puts another in its place and gives back its jobs, except the one that it was at."""
        job = worker.jobs.popleft()
        how = self._end(worker)
        if worker.jobs:
            waiting.appendleft(list(worker.jobs))
        self._workers[self._workers.index(worker)] = self._start()
        return job, EnvironmentFault(f"the worker process {how}")

    def _end(self, worker: _Worker) -> str:
        worker.connection.close()
        try:
            # One that has crashed has closed its end already; a moment lets the kernel report how.
            code = worker.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
            return f"did not answer within {self._limit:g} s; it was killed"
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            command = f"from sim.workers import _work; _work({theirs.fileno()}, {os.getpid()})"
            process = subprocess.Popen(
                [sys.executable, "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__.fileno() if sys.__stderr__ is not None else subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={
                    **os.environ,
                    **_SINGLE_THREAD,
                    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                },
            )
        connection = Connection(ours.detach())
        connection.send(self._made)
        return _Worker(process, connection)


def _error(kind: str, value: Any) -> Exception:
    if kind == "os":
        return OSError(*value)
    kinds: dict[str, type[SimError] | type[PolicyError]] = {
        "configuration": ConfigurationError,
        "policy": PolicyError,
        "fault": EnvironmentFault,
    }
    return kinds[kind](value)


def _work(handle: int, parent: int) -> None:
    """A worker's life: answers the jobs of each unit until the other end closes."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes this end
    connection = Connection(handle)
    module, name, arguments = connection.recv()
    target = None
    try:
        while True:
            for job in connection.recv():
                try:
                    if target is None:
                        target = getattr(importlib.import_module(module), name)(*arguments)
                    answer: tuple[str, Any] = ("value", target(job))
                except ConfigurationError as error:
                    answer = ("configuration", str(error))
                except PolicyError as error:
                    answer = ("policy", str(error))
                except OSError as error:
                    answer = ("os", (error.errno, error.strerror or str(error), error.filename))
                except Exception:  # the parent raises it with this traceback
                    answer = ("fault", traceback.format_exc())
                connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    finally:
        if target is not None:
            target.close()
