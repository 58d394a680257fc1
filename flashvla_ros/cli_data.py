"""Commands that make and convert demonstrations."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from flashvla_ros.errors import ConfigurationError


def parse_tasks(text: str) -> tuple[int, ...]:
    """Turns 0,3,7 into (0, 3, 7), and all into (). Raises ConfigurationError: neither."""
    if text == "all":
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigurationError(f"--tasks {text!r}: give 'all', or indices such as 0,3,7") from error


@dataclass(frozen=True)
class Collect:
    """Let the scripted expert solve tasks from sampled starts and keep the episodes, as LIBERO's files hold them.

    Stop it at any time; the same command goes on where it was.
    """

    out: tyro.conf.Positional[Path]
    """Folder for <suite>/<task>/seed_*.hdf5, <suite>/<task>_demo.hdf5 and <suite>/manifest.json."""
    suite: str = "libero_spatial"
    tasks: str = "all"
    """Indices such as 0,3,7, or all."""
    episodes: int = 50
    """Attempted for each task; those that fail are counted and not kept."""
    seed: int = 0
    """Of the first episode; the next has the next one."""
    workers: int = 2
    """Processes, each with one core's worth of work and about 1 GB."""
    images: str = "raw"
    """raw as LIBERO's tools read them, or webp: a tenth of the size."""
    image_size: int = 128
    """Pixels of both cameras."""
    renderer: str = "fast"
    """official or fast; train and evaluate with the same."""

    def run(self) -> int:
        from sim.collect import CollectConfig, collect

        config = CollectConfig(
            suite=self.suite,
            tasks=parse_tasks(self.tasks),
            episodes=self.episodes,
            seed=self.seed,
            images=self.images,
            image_size=self.image_size,
            renderer=self.renderer,
        )
        end = collect(config, self.out, self.workers, _Line())
        sys.stdout.write(f"{end.successes} successes, {end.failures} failures, {end.errors} errors in this run\n")
        return 1 if end.errors else 0


class _Line:
    """Progress on stderr: one line that changes on a terminal, a line every half minute in a file."""

    def __init__(self) -> None:
        self._shown = float("-inf")

    def __call__(self, progress) -> None:  # type: ignore[no-untyped-def]
        terminal = sys.stderr.isatty()
        last = progress.done == progress.total
        if not last and progress.seconds - self._shown < (0.5 if terminal else 30.0):
            return
        self._shown = progress.seconds
        made = progress.done - progress.before
        rate = f"{made / progress.seconds * 3600:.0f} episodes/h, {progress.frames / progress.seconds:.1f} frames/s"
        left = "?" if not made else f"{progress.seconds_left / 60:.0f} min left"
        text = (
            f"{progress.done}/{progress.total} episodes: {progress.successes} successes, {progress.failures} failures, "
            f"{progress.errors} errors; {rate if made else 'starting'}; {left}"
        )
        sys.stderr.write(f"\r{text}\x1b[K{chr(10) if last else ''}" if terminal else text + "\n")
        sys.stderr.flush()


COMMANDS = {"collect": Collect}
