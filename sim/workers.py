"""Worker processes that share out jobs: one that crashes or hangs costs one job, and is replaced."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from mllm.errors import PolicyError
from sim.errors import ConfigurationError, EnvironmentFault
from sim.process import end, start

_CLOSE_LIMIT = 5.0  # seconds
# A worker is one core's worth of work: the libraries under it would each start as many threads as there are cores.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS")
# Errors that another job would meet as well; the process sends the type's name.
_FATAL: dict[str, type[Exception]] = {error.__name__: error for error in (ConfigurationError, PolicyError, OSError)}


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    jobs: deque[Any] = field(default_factory=deque)
    since: float = 0.0  # when the first of them began


class Pool:
    """`workers` processes, each of which makes `module.name(*arguments)` and calls it with one job after another.

    limit: seconds in which a job must be answered.
    """

    def __init__(self, module: str, name: str, arguments: tuple[Any, ...], workers: int, limit: float) -> None:
        self._target = (module, name, arguments)
        self._count, self._limit = workers, limit
        self._workers: list[_Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.connection.close()  # one without a job ends by itself, in order
            if worker.jobs:
                worker.process.kill()
        for worker in self._workers:
            end(worker.process, _CLOSE_LIMIT)
        self._workers = []

    def run(self, units: Iterable[list[Any]]) -> Iterator[tuple[Any, Any]]:
        """Yields (job, answer) as answers come; the jobs of a unit are done one after the other by one worker.

        The answer to a job that its process did not survive is an EnvironmentFault that says how it ended.
        Raises ConfigurationError, PolicyError or OSError where a job did, and EnvironmentFault for any other error.
        """
        waiting = deque(unit for unit in units if unit)
        self._workers = [self._start() for _ in range(min(self._count, len(waiting)))]
        while True:
            for worker in self._workers:
                if not worker.jobs and waiting:
                    self._assign(worker, waiting.popleft())
            busy = [worker for worker in self._workers if worker.jobs]
            if not busy:
                return
            left = min(worker.since for worker in busy) + self._limit - time.monotonic()
            answered = wait([worker.connection for worker in busy], max(left, 0.0))
            for worker in busy:
                if worker.connection in answered:
                    yield self._take(worker, waiting)
                elif time.monotonic() - worker.since > self._limit:
                    yield self._replace(worker, waiting)

    def _take(self, worker: _Worker, waiting: deque[list[Any]]) -> tuple[Any, Any]:
        try:
            kind, value = worker.connection.recv()
        except (EOFError, OSError):
            return self._replace(worker, waiting)
        if kind != "answer":
            raise _FATAL.get(kind, EnvironmentFault)(*value)
        worker.since = time.monotonic()
        return worker.jobs.popleft(), value

    def _assign(self, worker: _Worker, unit: list[Any]) -> None:
        worker.jobs, worker.since = deque(unit), time.monotonic()
        with contextlib.suppress(OSError):  # one that has ended: shows when its answer is read
            worker.connection.send(list(unit))

    def _replace(self, worker: _Worker, waiting: deque[list[Any]]) -> tuple[Any, EnvironmentFault]:
        """Puts another worker in the place of one that is lost, and gives back its jobs but for the one it was at."""
        job = worker.jobs.popleft()
        if worker.jobs:
            waiting.appendleft(list(worker.jobs))
        worker.connection.close()
        how = end(worker.process)
        self._workers[self._workers.index(worker)] = self._start()
        return job, EnvironmentFault(f"the worker process {how}")

    def _start(self) -> _Worker:
        worker = _Worker(*start(__name__, dict.fromkeys(_THREADS, "1")))
        with contextlib.suppress(OSError):
            worker.connection.send(self._target)
        return worker


def _work(connection: Connection) -> None:
    """A worker's life: answers the jobs of each unit until the other end closes."""
    target = None
    with contextlib.suppress(EOFError, ConnectionError):
        module, name, arguments = connection.recv()
        while True:
            for job in connection.recv():
                try:
                    target = target or getattr(importlib.import_module(module), name)(*arguments)
                    answer: tuple[str, Any] = ("answer", target(job))
                except (ConfigurationError, PolicyError, OSError) as error:
                    kind = next(name for name, fatal in _FATAL.items() if isinstance(error, fatal))
                    answer = (kind, error.args)
                except Exception:  # the parent raises it with this traceback
                    answer = ("Exception", (traceback.format_exc(),))
                connection.send(answer)
    if target is not None:
        target.close()
