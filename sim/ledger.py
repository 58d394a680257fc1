"""What an evaluation still has to play, and the way of each finished episode into the run's file."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sim.errors import SimError
from sim.results import EpisodeKey, EpisodeResult, RunFile


@dataclass
class Progress:
    """Where an evaluation stands.

    outcomes: of those `planned` episodes that are done, in the order in which they ended.
    before: how many of them the run had when the evaluation began, at monotonic `started` s.
    """

    planned: Sequence[EpisodeKey]
    outcomes: dict[EpisodeKey, str]
    before: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        return len(self.outcomes)

    def seconds_left(self) -> float:
        """At the rate so far; NaN before the first episode."""
        played = self.done - self.before
        if not played:
            return float("nan")
        return (len(self.planned) - self.done) * (time.monotonic() - self.started) / played


class Ledger:
    """Opens the run at `path` for the episodes `keys`; a context manager, used by one thread.

    configurations: what an episode of each variant means; one that differs from the run's is refused.
    retry_errors: play episodes again that the run has as errors.
    error_limit: errors in a row after which `store` raises.
    on_progress: called at the start and after every episode.
    Raises ConfigurationError: the run cannot be written, or has another configuration.
    """

    def __init__(
        self,
        path: Path | str,
        configurations: Mapping[str, Mapping[str, Any]],
        keys: Sequence[EpisodeKey],
        retry_errors: bool = False,
        error_limit: int = 20,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self._run = RunFile(path, write=True)
        self._error_limit, self._on_progress = error_limit, on_progress
        self._errors_in_a_row = 0
        try:
            for variant, configuration in configurations.items():
                self._run.configure(variant, configuration)
            known = self._run.outcomes()
            outcomes = {
                key: known[key] for key in keys if key in known and not (retry_errors and known[key] == "error")
            }
            self.progress = Progress(keys, outcomes, before=len(outcomes))
            self.missing = [key for key in keys if key not in outcomes]
            on_progress(self.progress)
        except BaseException:
            self._run.close()
            raise

    def store(self, result: EpisodeResult) -> None:
        """Stores an episode for good. Raises ResultError: it cannot be.  Raises SimError: too many errors in a row."""
        self._run.add(result)
        self.progress.outcomes[result.key] = result.outcome
        self._on_progress(self.progress)
        self._errors_in_a_row = self._errors_in_a_row + 1 if result.outcome == "error" else 0
        if self._errors_in_a_row >= self._error_limit:
            raise SimError(
                f"the evaluation stopped after {self._errors_in_a_row} errors in a row; what was finished is in "
                f"{self._run.path}. The last one, {result.key}:\n{result.error}"
            )

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self._run.close()
