"""Plays episodes in several threads, each with an environment of its own, for one thread that serves them all."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sim.batching import Request, Stopped, answer
from sim.results import EpisodeKey, EpisodeResult

_LEAVE_LIMIT = 15.0  # s that workers have to end after a stop


class Player(Protocol):
    """Plays an episode at a time. Raises ConfigurationError: nothing can be played like this."""

    def play(self, key: EpisodeKey) -> EpisodeResult: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Left:
    """A worker's last word: what ended it, or None where there was nothing left to play."""

    error: BaseException | None


class Crew:
    """One thread for each of `players`, which take blocks of episodes until none is left.

    store: called with every finished episode, in the thread that calls `play`, which also answers what players `post`.
    max_batch: observations that a policy answers in one call at most.
    """

    def __init__(self, store: Callable[[EpisodeResult], None], max_batch: int = 1) -> None:
        self._store, self._max_batch = store, max_batch
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._requests: list[Request] = []
        self._stopping = threading.Event()
        self._at_work = 0

    def post(self, request: Request) -> None:
        """Brings a request to the thread that answers, from any thread."""
        self._messages.put(request)

    def play(self, blocks: Sequence[Sequence[EpisodeKey]], players: Sequence[Player]) -> None:
        """Returns when all is played. Whatever is raised here, by `store` or by a player, stops everything."""
        waiting = deque(blocks)
        for player in players:
            threading.Thread(target=self._work, args=(player, waiting), name="episodes", daemon=True).start()
            self._at_work += 1
        try:
            while self._at_work:
                self._receive()
                if self._requests:
                    answer(self._requests, self._max_batch)
                    self._requests.clear()
        finally:
            self._stop()

    def _work(self, player: Player, waiting: deque[Sequence[EpisodeKey]]) -> None:
        error: BaseException | None = None
        try:
            while not self._stopping.is_set():
                try:
                    block = waiting.popleft()
                except IndexError:
                    break
                for key in block:
                    if self._stopping.is_set():
                        break
                    self._messages.put(player.play(key))
        except Stopped:
            pass
        except BaseException as fault:  # raised again by the thread that called `play`
            error = fault
        finally:
            player.close()
            self._messages.put(_Left(error))

    def _receive(self, limit: float | None = None) -> None:
        """Waits for a message, takes all that there are, and does all of it but the policy's work."""
        message = self._messages.get(timeout=limit)
        while message is not None:
            if isinstance(message, Request):
                self._requests.append(message)
            elif isinstance(message, EpisodeResult):
                # While everything stops, the stop may be what broke an episode.
                if not (self._stopping.is_set() and message.outcome == "error"):
                    self._store(message)
            else:
                self._at_work -= 1
                if message.error is not None and not self._stopping.is_set():
                    raise message.error
            message = None if self._messages.empty() else self._messages.get()

    def _stop(self) -> None:
        """Lets the workers go, in the middle of their episodes where need be; finished ones are still stored."""
        self._stopping.set()
        end = time.monotonic() + _LEAVE_LIMIT
        while True:
            for request in self._requests:
                if not request.answer.done():
                    request.answer.set_exception(Stopped())
            self._requests.clear()
            if not self._at_work or time.monotonic() > end:
                return
            with contextlib.suppress(queue.Empty):
                self._receive(max(end - time.monotonic(), 0.0))
