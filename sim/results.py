"""Results of an evaluation: one SQLite file, one row an episode, whole after a crash at any moment."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sim.errors import ConfigurationError, ResultError

_SCHEMA_VERSION = 1
# `init_state` has no type on purpose: it holds a number, or the word "sampled".
_SCHEMA = f"""
CREATE TABLE variants (variant TEXT PRIMARY KEY, configuration TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE episodes (
    suite TEXT NOT NULL, task INTEGER NOT NULL, init_state NOT NULL, seed INTEGER NOT NULL,
    variant TEXT NOT NULL REFERENCES variants, language TEXT NOT NULL,
    outcome TEXT NOT NULL CHECK (outcome IN ('success', 'failure', 'error')),
    steps INTEGER NOT NULL, started TEXT NOT NULL, finished TEXT NOT NULL,
    latency TEXT NOT NULL, flags TEXT NOT NULL, provenance TEXT NOT NULL, error TEXT,
    log BLOB NOT NULL, video BLOB,
    PRIMARY KEY (suite, task, init_state, seed, variant),
    CHECK ((outcome = 'error') = (error IS NOT NULL))
);
PRAGMA user_version = {_SCHEMA_VERSION};
"""
_KEY = ("suite", "task", "init_state", "seed", "variant")
_JSON = ("latency", "flags", "provenance")


@dataclass(frozen=True)
class EpisodeKey:
    """Which episode. Equal keys start equally, so that runs of different policies can be paired by them.

    init_state: number of an official initial state, or "sampled" (drawn by `seed`).
    variant: name of the configuration within its run; a sweep has one for each.
    """

    suite: str
    task: int
    init_state: int | str
    seed: int
    variant: str = ""

    def __str__(self) -> str:
        name = f"{self.suite} task {self.task} state {self.init_state} seed {self.seed}"
        return f"{name} variant {self.variant}" if self.variant else name


@dataclass(frozen=True)
class EpisodeResult:
    """One row of a run.

    outcome: "success", "failure", or "error", which says nothing about the policy and has its traceback in `error`.
    steps: control steps taken, T.  started, finished: ISO 8601, UTC.
    actions: (T, 7) float32.  timing: stage -> (T,) float64 s, NaN in the steps that did not have the stage.
    latency: stage -> {"mean", "p50", "p99": s, "n": steps that had the stage}.
    flags: flag -> {"mean", "n"} of a number or boolean over the steps that had it, or {"counts": {text: steps}}.
    provenance: see `sim.versions`.  video: MP4, or None where none was recorded, or none was asked of the file.
    """

    key: EpisodeKey
    language: str
    outcome: str
    steps: int
    started: str
    finished: str
    actions: np.ndarray
    timing: Mapping[str, np.ndarray]
    flags: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    video: bytes | None = None

    @property
    def latency(self) -> dict[str, dict[str, float]]:
        return {stage: summary for stage, seconds in self.timing.items() if (summary := summarise_seconds(seconds))}


def summarise_seconds(seconds: np.ndarray) -> dict[str, float]:
    """Mean, median and 99th percentile in s of those that are not NaN, and how many; empty where none is."""
    had = seconds[~np.isnan(seconds)]
    if not had.size:
        return {}
    p50, p99 = np.percentile(had, (50, 99))
    return {"mean": float(had.mean()), "p50": float(p50), "p99": float(p99), "n": int(had.size)}


def summarise_flags(steps: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What a policy flagged in each step, over an episode; see `EpisodeResult.flags`."""
    values: dict[str, list[Any]] = {}
    for flags in steps:
        for name, value in flags.items():
            values.setdefault(name, []).append(value)
    summary: dict[str, dict[str, Any]] = {}
    for name, seen in values.items():
        if all(isinstance(value, (bool, int, float, np.generic)) for value in seen):
            summary[name] = {"mean": float(np.mean(seen)), "n": len(seen)}
        else:
            texts = [str(value) for value in seen]
            summary[name] = {"counts": {text: texts.count(text) for text in sorted(set(texts))}}
    return summary


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested configurations, one text each: "env.renderer was 'fast', is 'official'"."""
    found = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} was {old!r}, is {new!r}")
    return found


class RunFile:
    """A run, opened to read (also while it is being written) or, by one process at a time, to write.

    Every episode is one transaction: after a crash the file holds each episode entirely or not at all.
    Raises ConfigurationError: no such file, not a run, or another process is writing it.
    """

    def __init__(self, path: Path | str, write: bool = False) -> None:
        self.path = Path(path)
        self._lock = _lock(self.path) if write else None
        try:
            self._connection = self._open(write)
        except BaseException:
            self._unlock()
            raise

    def _open(self, write: bool) -> sqlite3.Connection:
        if not write and not self.path.is_file():
            raise ConfigurationError(f"there is no run at {self.path}")
        connection = sqlite3.connect(
            f"{self.path.resolve().as_uri()}?mode={'rwc' if write else 'ro'}", uri=True, isolation_level=None
        )
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if write and not version and not tables:
                connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
                version = _SCHEMA_VERSION
            if write and version == _SCHEMA_VERSION:
                connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
        except sqlite3.Error as error:
            connection.close()
            raise ConfigurationError(f"{self.path} cannot be opened as a run: {error}") from error
        if version != _SCHEMA_VERSION:
            connection.close()
            raise ConfigurationError(
                f"{self.path} is not a run of version {_SCHEMA_VERSION} (it says {version}): give another file"
            )
        return connection

    def configure(self, variant: str, configuration: Mapping[str, Any]) -> None:
        """Says what the episodes of `variant` mean; the first time it is stored, later it must be the same.

        Raises ConfigurationError: it differs from what the run has, and in what.
        """
        now = json.loads(json.dumps(configuration))
        before = self.configurations().get(variant)
        if before is None:
            with self._writing(f"the configuration of variant {variant!r}"):
                self._connection.execute("INSERT INTO variants VALUES (?, ?)", (variant, json.dumps(now)))
        elif changed := differences(before, now):
            raise ConfigurationError(
                f"{self.path} was made with another configuration: {'; '.join(changed)}. Use the same one to go on, or "
                "another file, or another --variant"
            )

    def configurations(self) -> dict[str, dict[str, Any]]:
        """Variant -> configuration."""
        rows = self._connection.execute("SELECT variant, configuration FROM variants ORDER BY variant")
        return {variant: json.loads(text) for variant, text in rows}

    def add(self, result: EpisodeResult) -> None:
        """Stores an episode, durably. It may take the place of an error, never of a success or failure.

        Raises ResultError: the run has it already, or the file cannot be written.
        """
        key, log = result.key, io.BytesIO()
        np.savez_compressed(
            log,
            actions=result.actions,
            stages=np.array(list(result.timing), dtype=np.str_),
            timing=np.array(list(result.timing.values()), np.float32),
        )
        row = {
            **{name: getattr(key, name) for name in _KEY},
            **{
                name: getattr(result, name)
                for name in ("language", "outcome", "steps", "started", "finished", "error", "video")
            },
            **{name: json.dumps(getattr(result, name)) for name in _JSON},
            "log": log.getvalue(),
        }
        command = (
            f"INSERT INTO episodes ({', '.join(row)}) VALUES ({', '.join('?' * len(row))}) "
            f"ON CONFLICT DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in row if name not in _KEY)} "
            "WHERE episodes.outcome = 'error'"
        )
        with self._writing(str(key)):
            stored = self._connection.execute(command, tuple(row.values())).rowcount
        if not stored:
            raise ResultError(f"{self.path} has a result of {key} already; it was kept, and this one was not stored")

    def outcomes(self) -> dict[EpisodeKey, str]:
        """Every episode that the run has, and how it ended."""
        rows = self._connection.execute(f"SELECT {', '.join(_KEY)}, outcome FROM episodes")
        return {EpisodeKey(*row[:-1]): row[-1] for row in rows}

    def episodes(self, variant: str | None = None, videos: bool = False) -> Iterator[EpisodeResult]:
        """The episodes of one variant, or of all, in the order of their keys.  videos: read these as well."""
        columns = [*_KEY, "language", "outcome", "steps", "started", "finished", "flags", "provenance", "error", "log"]
        columns += ["video" if videos else "NULL AS video"]
        rows = self._connection.execute(
            f"SELECT {', '.join(columns)} FROM episodes WHERE ?1 IS NULL OR variant = ?1 ORDER BY {', '.join(_KEY)}",
            (variant,),
        )
        for row in rows:
            values = dict(zip([*columns[:-1], "video"], row, strict=True))
            with np.load(io.BytesIO(values.pop("log")), allow_pickle=False) as log:
                timing = {
                    str(name): seconds.astype(float) for name, seconds in zip(log["stages"], log["timing"], strict=True)
                }
                actions = log["actions"]
            yield EpisodeResult(
                key=EpisodeKey(*(values.pop(name) for name in _KEY)),
                actions=actions,
                timing=timing,
                flags=json.loads(values.pop("flags")),
                provenance=json.loads(values.pop("provenance")),
                **values,
            )

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise ResultError(
                f"{what} could not be stored in {self.path}: {error}. What was stored before is kept: once this is "
                "repaired, the same command goes on where it stopped"
            ) from error

    def close(self) -> None:
        """A second call does nothing."""
        if self._lock is not None:
            # A finished run is one plain file, which can be read where nothing may be written; somebody who reads it
            # at this moment keeps the write-ahead log, which does no harm.
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("PRAGMA journal_mode = DELETE")
        self._connection.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            _lock_path(self.path).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _lock(path: Path) -> int:
    """Holds a file beside `path` locked; the kernel lets go of it when this process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = _lock_path(path)
    while True:
        handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ConfigurationError(f"another process is writing {path}: wait for it, or give another file") from None
        with contextlib.suppress(FileNotFoundError):
            if os.stat(name).st_ino == os.fstat(handle).st_ino:
                return handle
        os.close(handle)  # its last holder removed it between our two calls
