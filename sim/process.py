"""A Python process at the other end of a pipe, which dies with the thread that started it."""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection

_PR_SET_PDEATHSIG = 1


def start(module: str, environment: Mapping[str, str] | None = None) -> tuple[subprocess.Popen[bytes], Connection]:
    """Starts a process that runs `module._work(connection)`, and returns our end of the connection.

    environment: variables to add. What the process prints goes to stderr: stdout belongs to the caller.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        command = f"from sim.process import run; run({module!r}, {theirs.fileno()}, {os.getpid()})"
        process = subprocess.Popen(
            [sys.executable, "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=sys.__stderr__.fileno() if sys.__stderr__ is not None else subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={
                **os.environ,
                **(environment or {}),
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            },
        )
    return process, Connection(ours.detach())


def run(module: str, handle: int, parent: int) -> None:
    """The process's life. Ctrl-C is for the parent, which closes its end."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    importlib.import_module(module)._work(Connection(handle))


def end(process: subprocess.Popen[bytes], grace: float = 1.0) -> str:
    """Ends a process, by force after `grace` seconds, and says how it ended, such as "died of SIGSEGV".

    One that has crashed has closed its end of the connection already; a moment lets the kernel report how.
    """
    try:
        code = process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "stopped answering"
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
