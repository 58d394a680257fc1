"""Commands that make and convert demonstrations."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from flashvla_ros.errors import ConfigurationError
from flashvla_ros.fields import json_object

if TYPE_CHECKING:
    from sim.collect import Progress


@dataclass(frozen=True)
class Collect:
    """Let the scripted expert solve tasks from sampled starts and keep the episodes, as LIBERO's files hold them.

    With --policy, a policy acts and the expert only says what it should have done (DAgger). Stop it at any time: the
    same command goes on where it was.
    """

    out: tyro.conf.Positional[Path]
    """Folder for <suite>/<task>/seed_*.hdf5, <suite>/<task>_demo.hdf5 and <suite>/manifest.json."""
    suite: str = "libero_spatial"
    tasks: str = "all"
    """all, indices such as 0-3,7, or one instruction."""
    episodes: int = 50
    """Attempted for each task. The expert's failures are counted and not kept; a policy's are kept."""
    seed: int = 1000
    """Of the first episode; the next has the next one. eval --draw counts from 0: keep them apart."""
    draw: Literal["sampled", "shuffled"] = "sampled"
    """Starts as LIBERO draws them, or with instructions about any object: in libero_spatial either bowl may be asked
    for, in libero_object any object, and they exchange places."""
    cut: int | None = None
    """End every episode after so many steps, and keep it: many beginnings show what words mean in a scene for the price
    of a few whole episodes."""
    workers: int = 2
    """Processes; each is one core's worth of work and takes about 2 GB."""
    images: str = "raw"
    """raw as LIBERO's tools read them, or webp: a tenth of the size."""
    image_size: int = 128
    """Pixels of both cameras."""
    renderer: str = "fast"
    """official or fast; train and evaluate with the same."""
    policy: str = ""
    """Name of an installed policy, or a folder of weights, that acts instead of the disturbed expert."""
    policy_options: str = "{}"
    """JSON object: keyword arguments of the policy's constructor."""
    beta: float = 0.5
    """Share of a policy's episodes in which the expert takes over now and then."""

    def run(self) -> int:
        from sim.collect import CollectConfig, collect
        from sim.dagger import PolicyMix
        from sim.schedule import parse_tasks

        options = json_object("--policy-options", self.policy_options)
        config = CollectConfig(
            suite=self.suite,
            tasks=parse_tasks(self.suite, self.tasks),
            episodes=self.episodes,
            seed=self.seed,
            draw=self.draw,
            cut=self.cut,
            images=self.images,
            image_size=self.image_size,
            renderer=self.renderer,
            policy=PolicyMix(self.policy, options, self.beta) if self.policy else None,
        )
        end = collect(config, self.out, self.workers, Line())
        sys.stdout.write(f"{outcomes(end)} in this run\n")
        if end.errors:
            sys.stderr.write(f"tracebacks are in {self.out / self.suite / 'manifest.json'}\n")
        return 1 if end.errors else 0


@dataclass(frozen=True)
class Export:
    """Convert demonstrations for other tools: a LeRobotDataset v3, which the lerobot package opens."""

    dataset: tyro.conf.Positional[Path]
    """Folder that `flashvla collect` wrote, or a part of it."""
    out: tyro.conf.Positional[Path]
    """New folder."""
    format: Literal["lerobot"] = "lerobot"

    def run(self) -> int:
        from mllm.lerobot import export_lerobot

        def progress(done: int, total: int) -> None:
            if sys.stderr.isatty():
                sys.stderr.write(f"\r{done}/{total} episodes\x1b[K" + "\n" * (done == total))

        done = export_lerobot(self.dataset, self.out, progress)
        skipped = f"; {done.skipped} episodes without a label were left out" if done.skipped else ""
        sys.stdout.write(f"{done.episodes} episodes, {done.frames} frames written to {self.out}{skipped}\n")
        return 0


@dataclass(frozen=True)
class Calibrate:
    """Find from which change on a frame has changed, for --reuse gated: demonstrations in which only the robot acts.

    Give the result as its setting max_surprise.
    """

    dataset: tyro.conf.Positional[Path]
    """Folder that `flashvla collect` wrote, or a part of it."""
    quantile: float = 0.9
    """Share of the frames that shall not count as changed."""
    episodes: int = 80
    """Drawn from the folder at most."""
    seed: int = 0
    """Of the draw."""

    def run(self) -> int:
        import random

        from mllm.demonstrations import demonstration_files
        from mllm.frame_gate import calibrate

        if self.episodes < 1:
            raise ConfigurationError(f"--episodes is {self.episodes}: it must be 1 or more")
        files = demonstration_files(self.dataset)
        drawn = random.Random(self.seed).sample(files, min(self.episodes, len(files)))
        found = calibrate(drawn, self.quantile)
        sys.stdout.write(
            f"max_surprise {found.threshold:.1f}: {100 * (1 - self.quantile):.3g} % of {found.frames} frames of "
            f"{found.episodes} episodes exceed it\n"
        )
        return 0


def outcomes(progress: Progress) -> str:
    """How many episodes of a run ended how."""
    cut = f"{progress.cut} cut, " if progress.cut else ""
    return f"{cut}{progress.successes} successes, {progress.failures} failures, {progress.errors} errors"


class Line:
    """Progress on stderr: one line that changes on a terminal, a line every half minute in a file."""

    def __init__(self) -> None:
        self._shown = float("-inf")

    def __call__(self, progress: Progress) -> None:
        terminal = sys.stderr.isatty()
        last = progress.done == progress.total
        if not last and progress.seconds - self._shown < (0.5 if terminal else 30.0):
            return
        self._shown = progress.seconds
        made = progress.done - progress.before
        text = f"{progress.done}/{progress.total} episodes: {outcomes(progress)}"
        if made:
            hourly, rate = made / progress.seconds * 3600, progress.frames / progress.seconds
            text += f"; {hourly:.0f} episodes/h, {rate:.1f} frames/s, {progress.seconds_left / 60:.0f} min left"
        sys.stderr.write(f"\r{text}\x1b[K{chr(10) if last else ''}" if terminal else text + "\n")
        sys.stderr.flush()


COMMANDS = {"collect": Collect, "export": Export, "calibrate": Calibrate}
