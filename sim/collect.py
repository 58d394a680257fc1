"""Demonstrations by the dozen: the scripted expert in worker processes, from freshly sampled resets.

An episode is a pure function of suite, task, seed and settings, and a file says that it was done: a collection that was
stopped, whenever and however, goes on where it was when it is started again, and ends with the same files.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mllm.demonstrations import CAMERAS, IMAGE_FORMATS, write_demonstration
from sim.dagger import MixedPolicy, PolicyMix
from sim.dataset import Attempt, SuiteFolder
from sim.demonstrate import demonstrate
from sim.env import EnvConfig, LiberoEnv
from sim.errors import ConfigurationError
from sim.executor import Noise, NoisyExpert
from sim.tasks import check_draw, find_task, suite_tasks
from sim.workers import Pool

Job = tuple[int, int]  # task, seed


@dataclass(frozen=True)
class CollectConfig:
    """What to collect, and how.

    tasks: indices; none means all.  episodes: attempted for each task, with the seeds `seed` to `seed + episodes - 1`.
    images: "raw" or "webp", see `mllm.demonstrations`.  renderer, stepper, image_size: see `sim.env.EnvConfig`.
    cut: steps after which an episode ends and is kept as it is; None is an episode to its end. Beginnings show what the
    words mean in many scenes for the price of a few whole episodes.
    draw: how starts are drawn, see `sim.tasks.DRAWS`.
    policy: who acts; None is the expert, disturbed by `noise`.
    turn: episodes of one task before the next one has its turn: few keep a stopped collection balanced, and many build
    fewer scenes, which takes about as long as an episode. Beginnings have ten times as many.
    """

    suite: str = "libero_spatial"
    tasks: tuple[int, ...] = ()
    episodes: int = 50
    seed: int = 0
    images: str = "raw"
    renderer: str = "fast"
    stepper: str = "fast"
    image_size: int = 128
    cut: int | None = None
    draw: str = "sampled"
    noise: Noise = field(default_factory=Noise)
    policy: PolicyMix | None = None
    turn: int = 5

    def __post_init__(self) -> None:
        tasks = self.tasks or range(len(suite_tasks(self.suite)))
        object.__setattr__(self, "tasks", tuple(find_task(self.suite, task).index for task in tasks))
        if len(set(self.tasks)) != len(self.tasks):
            raise ConfigurationError(f"CollectConfig.tasks names one twice: {self.tasks}")
        for name in ("episodes", "turn", "cut"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigurationError(f"CollectConfig.{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.seed <= 2**32 - self.episodes:
            raise ConfigurationError(f"CollectConfig.seed is {self.seed}: it must be from 0 to {2**32 - self.episodes}")
        if self.images not in IMAGE_FORMATS:
            raise ConfigurationError(f"CollectConfig.images is {self.images!r}: choose {' or '.join(IMAGE_FORMATS)}")
        check_draw(self.suite, self.draw)
        self.env(self.tasks[0])

    def env(self, task: int) -> EnvConfig:
        """The environment of a task. Raises ConfigurationError: see `sim.env.EnvConfig`."""
        return EnvConfig(
            suite=self.suite,
            task=task,
            cameras=tuple(CAMERAS),
            image_size=self.image_size,
            renderer=self.renderer,
            stepper=self.stepper,
            step_limit=self.cut,
        )

    def settings(self) -> dict[str, Any]:
        """What all episodes of one folder have in common. Raises PolicyError: the policy cannot be made."""
        varying = ("tasks", "episodes", "seed", "turn")
        settings = {name: value for name, value in asdict(self).items() if name not in varying}
        said = self.policy.provenance() if self.policy else {}
        return {**settings, "policy_provenance": said} if said else settings


@dataclass(frozen=True)
class Progress:
    """How far a collection is.

    done: episodes of `total` that need no more work, `before` of them from earlier runs.
    successes, failures, errors, cut: of this run.  frames: that it kept.  seconds: since it began.
    """

    total: int
    before: int
    done: int
    successes: int = 0
    failures: int = 0
    errors: int = 0
    cut: int = 0
    frames: int = 0
    seconds: float = 0.0

    def after(self, attempt: Attempt, seconds: float) -> Progress:
        return replace(
            self,
            done=self.done + 1,
            successes=self.successes + (attempt.outcome == "success"),
            failures=self.failures + (attempt.outcome == "failure"),
            errors=self.errors + (attempt.outcome == "error"),
            cut=self.cut + (attempt.outcome == "cut"),
            frames=self.frames + attempt.steps * attempt.kept,
            seconds=seconds,
        )

    @property
    def seconds_left(self) -> float:
        """At the rate so far; NaN before the first episode."""
        made = self.done - self.before
        return self.seconds / made * (self.total - self.done) if made else float("nan")


class Collector:
    """What a worker process runs: one episode after the other, in one environment while the task stays the same."""

    def __init__(self, config: CollectConfig, root: Path) -> None:
        self._config, self._folder = config, SuiteFolder(root, config.suite)
        self._env: LiberoEnv | None = None
        self._executor = MixedPolicy(config.policy) if config.policy else NoisyExpert(config.noise)

    def __call__(self, job: Job) -> Attempt:
        """Plays an episode and writes it. A fault in it is an outcome, with its traceback.

        Raises ConfigurationError: the expert cannot do the task.  Raises OSError: the file cannot be written.
        """
        task, seed = job
        env = self._environment(task)
        try:
            demonstration = demonstrate(env, self._executor, seed, self._config.draw)
        except ConfigurationError:
            raise
        except Exception:  # of the simulator, the expert or a policy
            self.close()
            return Attempt(task, seed, "error", error=traceback.format_exc())
        outcome = demonstration.outcome
        if self._config.cut and not demonstration.success:
            outcome = "cut"
        kept = outcome != "failure" or self._executor.keeps_failures
        if kept:
            write_demonstration(self._folder.episode(task, seed), demonstration, self._config.images)
        return Attempt(task, seed, outcome, len(demonstration.actions), kept)

    def _environment(self, task: int) -> LiberoEnv:
        if self._env is None or self._env.task.index != task:
            self.close()
            self._env = LiberoEnv(self._config.env(task))
        return self._env

    def close(self) -> None:
        """Frees the environment; the next call makes another."""
        if self._env is not None:
            self._env.close()
            self._env = None


def collect(
    config: CollectConfig,
    out: Path,
    workers: int = 2,
    progress: Callable[[Progress], None] = lambda _: None,
    episode_limit: float = 600.0,
    stop: Callable[[], bool] = lambda: False,
) -> Progress:
    """Collects what is missing in `out`, see `sim.dataset` for what lies where, and returns how it went.

    An episode that raises, takes longer than `episode_limit` seconds, or takes its process with it is an error in the
    manifest, and tried again by the next run; one that fails is not.
    stop: asked after every episode; what others are at is then given up.
    Raises ConfigurationError: other settings than the folder's, a folder in use, or a task that the expert cannot do.
    Raises PolicyError: a policy that cannot be made, or a damaged file in the folder.
    Raises OSError: a file cannot be written. Whatever it raises, finished episodes stay.
    """
    if workers < 1:
        raise ConfigurationError(f"workers is {workers}: it must be at least 1")
    folder, settings = SuiteFolder(out, config.suite), config.settings()
    with folder.locked():
        folder.begin(settings, config.tasks)
        units = [[job for job in unit if not folder.finished(*job)] for unit in _turns(config)]
        total = config.episodes * len(config.tasks)
        before = total - sum(map(len, units))
        state = Progress(total, before, done=before)
        progress(state)
        started = time.monotonic()
        try:
            with Pool("sim.collect", "Collector", (config, out), workers, episode_limit) as pool:
                for (task, seed), answer in pool.run(units):
                    fault = Attempt(task, seed, "error", error=str(answer))
                    attempt = answer if isinstance(answer, Attempt) else fault
                    folder.record(attempt)
                    state = state.after(attempt, time.monotonic() - started)
                    progress(state)
                    if stop():
                        break
        finally:
            folder.summarise()
    return state


def _turns(config: CollectConfig) -> Iterator[list[Job]]:
    """Every episode, a turn of each task after the other."""
    end = config.seed + config.episodes
    turn = config.turn * (1 if config.cut is None else 10)
    for first in range(config.seed, end, turn):
        for task in config.tasks:
            yield [(task, seed) for seed in range(first, min(first + turn, end))]
