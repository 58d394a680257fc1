"""An environment in a process of its own, so that a crash or a hang costs one episode and not the evaluation."""

from __future__ import annotations

import contextlib
import subprocess
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np

from sim.env import EnvConfig, LiberoEnv
from sim.errors import ConfigurationError, EnvironmentFault
from sim.process import end, start
from sim.remote_env import RemoteEnv

_CLOSE_LIMIT = 5.0  # seconds


class SupervisedEnv(RemoteEnv):
    """`LiberoEnv` in a worker process: the same calls, each within a time limit.

    A worker that crashes or does not answer is killed, and the call raises EnvironmentFault with how it ended; the
    next `reset` starts another worker. The worker dies with the thread that started it.
    start_limit: seconds to build the scene.  call_limit: seconds for any other call.
    factory: what the worker builds; a class or function of a module, found there by name.
    """

    def __init__(
        self,
        config: EnvConfig | None = None,
        start_limit: float = 180.0,
        call_limit: float = 60.0,
        factory: Callable[[EnvConfig], LiberoEnv] = LiberoEnv,
    ) -> None:
        for name, value in (("start_limit", start_limit), ("call_limit", call_limit)):
            if not (np.isfinite(value) and value > 0):
                raise ConfigurationError(f"{name} is {value}: it must be a finite number of seconds above 0")
        super().__init__(config)
        self._start_limit, self._call_limit = start_limit, call_limit
        self._factory = factory
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._provenance: dict[str, str] = {}

    @property
    def worker_pid(self) -> int | None:
        """Process number of the worker; None where none is running."""
        return None if self._process is None else self._process.pid

    def begin(self) -> None:
        """Starts a worker where none is running."""
        if self._process is None:
            self._process, self._connection = start(__name__)
            self._provenance = {}
            self._exchange("start", self._start_limit, (self._factory, self.config), {})

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """See `RemoteEnv.call`."""
        return self._exchange(method, self._call_limit, args, kwargs)

    def provenance(self) -> dict[str, str]:
        """See `LiberoEnv.provenance`; asked of each worker once."""
        if not self._provenance:
            self._provenance = super().provenance()
        return self._provenance

    def close(self) -> None:
        """Ends the worker, by force where it does not answer; a second call does nothing."""
        if self._process is not None:
            with contextlib.suppress(EnvironmentFault):
                self._exchange("close", min(_CLOSE_LIMIT, self._call_limit), (), {})
            self._kill()

    def __enter__(self) -> SupervisedEnv:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _exchange(self, method: str, limit: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._process is None or self._connection is None:
            raise EnvironmentFault(f"no worker is running for {method}(): call reset() first")
        try:
            self._connection.send((method, args, kwargs))
            answered = self._connection.poll(limit)
            kind, value = self._connection.recv() if answered else ("silence", None)
        except (EOFError, OSError) as error:
            raise EnvironmentFault(f"the environment's worker {self._kill()} during {method}()") from error
        except BaseException:
            # An interrupted exchange leaves half an answer in the pipe, which nobody can trust afterwards.
            self._kill()
            raise
        if kind == "silence":
            self._kill()
            raise EnvironmentFault(
                f"the environment's worker did not answer {method}() within {limit:g} s; it was killed"
            )
        if kind == "configuration":
            if method == "start":
                self._kill()
            raise ConfigurationError(value)
        if kind == "fault":
            self._kill()
            raise EnvironmentFault(f"{method}() failed in the environment's worker:\n{value}")
        return value

    def _kill(self) -> str:
        """Ends the worker and says how it ended, such as "died of SIGSEGV"."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is None:
            return "was not running"
        return end(process)


def _work(connection: Connection) -> None:
    """The worker's life: answers (method, args, kwargs) until the other end closes."""
    env: LiberoEnv | None = None
    while True:
        try:
            method, args, kwargs = connection.recv()
        except EOFError:
            break
        try:
            if method == "start":
                factory, config = args
                env = factory(config)
                answer: tuple[str, Any] = ("value", None)
            else:
                answer = ("value", getattr(env, method)(*args, **kwargs))
        except ConfigurationError as error:
            answer = ("configuration", str(error))
        except Exception:  # the parent raises it with this traceback
            answer = ("fault", traceback.format_exc())
        connection.send(answer)
