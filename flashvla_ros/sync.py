"""Approximate time synchronisation of several inputs, without queues of stale data. Pure logic, no ROS."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

HISTORY = 8  # messages kept an input: enough for inputs of unequal rate, few enough to stay fresh


class ApproximateSync:
    """Forms sets of one message an input whose stamps lie within `slop_ns` of each other; the newest such set wins.

    A set is given out once, and never one older than a set given out before. Stamps that go back by more than
    `reset_ns` (a restarted source or simulator) start everything anew.
    """

    def __init__(self, names: Iterable[str], slop_ns: int, reset_ns: int = 1_000_000_000) -> None:
        self._buffers: dict[str, dict[int, Any]] = {name: {} for name in names}
        self._slop_ns, self._reset_ns = slop_ns, reset_ns
        self._newest_ns = 0
        self._given_ns = -1
        self.unmatched = 0  # messages thrown away without having been part of a set

    def add(self, name: str, stamp_ns: int, message: Any) -> tuple[int, dict[str, Any]] | None:
        """Adds one message. Returns (stamp of the set: its newest, {name: message}) when a new set is complete."""
        if stamp_ns < self._newest_ns - self._reset_ns:
            self.clear()
        self._newest_ns = max(self._newest_ns, stamp_ns)
        buffer = self._buffers[name]
        buffer[stamp_ns] = message
        while len(buffer) > HISTORY:
            del buffer[min(buffer)]
            self.unmatched += 1
        return self._match(stamp_ns)

    def clear(self) -> None:
        """Forgets everything, as at the start of an episode."""
        for buffer in self._buffers.values():
            buffer.clear()
        self._newest_ns, self._given_ns = 0, -1

    def _match(self, around_ns: int) -> tuple[int, dict[str, Any]] | None:
        chosen = {}
        for name, buffer in self._buffers.items():
            nearest = min(buffer, key=lambda stamp: abs(stamp - around_ns), default=None)
            if nearest is None:
                return None
            chosen[name] = nearest
        stamp = max(chosen.values())
        if stamp - min(chosen.values()) > self._slop_ns or stamp <= self._given_ns:
            return None
        messages = {name: self._buffers[name][chosen[name]] for name in chosen}
        self._given_ns = stamp
        for name, buffer in self._buffers.items():
            for old in [s for s in buffer if s <= chosen[name]]:
                del buffer[old]
                self.unmatched += old != chosen[name]
        return stamp, messages
