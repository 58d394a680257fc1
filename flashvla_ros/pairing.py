"""A command travels as two standard messages, twist and gripper, of one stamp; this puts them together again."""

from __future__ import annotations

from typing import Any

MAX_PENDING = 16


class Pairing:
    """Joins the two halves of a command, in whichever order they come."""

    def __init__(self) -> None:
        self._pending: dict[int, dict[str, Any]] = {}

    def add(self, stamp_ns: int, kind: str, value: Any) -> dict[str, Any] | None:
        """Adds the "twist" or "gripper" half of a stamp. Returns both halves once they are there."""
        halves = self._pending.setdefault(stamp_ns, {})
        halves[kind] = value
        return self._pending.pop(stamp_ns) if len(halves) == 2 else None

    def abandoned(self) -> list[tuple[int, str]]:
        """Takes out the oldest halves beyond 16 waiting ones: (stamp, kind) of each."""
        taken = []
        while len(self._pending) > MAX_PENDING:
            stamp = next(iter(self._pending))
            taken.append((stamp, next(iter(self._pending.pop(stamp)))))
        return taken
