"""Demonstrations by the dozen: the scripted expert in worker processes, from freshly sampled resets.

An episode is a pure function of suite, task, seed and settings, and a file says that it was done: a collection that was
stopped, whenever and however, goes on where it was when it is started again, and ends with the same files.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mllm.demonstrations import CAMERAS, IMAGE_FORMATS, Demonstration, write_demonstration
from sim.dataset import SuiteFolder
from sim.env import EnvConfig, LiberoEnv
from sim.errors import ConfigurationError
from sim.executor import Executor, Noise, NoisyExpert
from sim.expert import make_expert
from sim.tasks import SUITES, find_task, suite_tasks
from sim.workers import Pool


@dataclass(frozen=True)
class CollectConfig:
    """What to collect, and how.

    tasks: indices; none means all.  episodes: attempted for each task, with the seeds `seed` to `seed + episodes - 1`.
    images: "raw" or "webp", see `mllm.demonstrations`.  renderer, stepper, image_size, step_limit: see
    `sim.env.EnvConfig`.
    noise: of the executed actions.
    turn: episodes of one task before the next one has its turn: few keep a stopped collection balanced, and many build
    fewer scenes, which takes about as long as an episode.
    """

    suite: str = "libero_spatial"
    tasks: tuple[int, ...] = ()
    episodes: int = 50
    seed: int = 0
    images: str = "raw"
    renderer: str = "fast"
    stepper: str = "fast"
    image_size: int = 128
    step_limit: int | None = None
    noise: Noise = field(default_factory=Noise)
    turn: int = 5

    def __post_init__(self) -> None:
        tasks = self.tasks or tuple(range(len(suite_tasks(self.suite))))
        object.__setattr__(self, "tasks", tuple(find_task(self.suite, task).index for task in tasks))
        if len(set(self.tasks)) != len(self.tasks):
            raise ConfigurationError(f"CollectConfig.tasks names one twice: {self.tasks}")
        for name in ("episodes", "turn"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"CollectConfig.{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.seed <= 2**32 - self.episodes:
            raise ConfigurationError(f"CollectConfig.seed is {self.seed}: it must be from 0 to {2**32 - self.episodes}")
        if self.images not in IMAGE_FORMATS:
            raise ConfigurationError(f"CollectConfig.images is {self.images!r}: choose {' or '.join(IMAGE_FORMATS)}")
        self.env(self.tasks[0])

    def env(self, task: int) -> EnvConfig:
        return EnvConfig(
            suite=self.suite,
            task=task,
            cameras=tuple(CAMERAS),
            image_size=self.image_size,
            renderer=self.renderer,
            stepper=self.stepper,
            step_limit=self.step_limit,
        )

    def settings(self) -> dict[str, Any]:
        """What every episode of one folder has in common."""
        varying = ("tasks", "episodes", "seed", "turn")
        return {name: value for name, value in asdict(self).items() if name not in varying}


@dataclass(frozen=True)
class Attempt:
    """How one episode ended. outcome: "success", "failure" or "error".  kept: whether its file was written."""

    task: int
    seed: int
    outcome: str
    steps: int
    kept: bool
    error: str = ""


@dataclass(frozen=True)
class Progress:
    """done: episodes of `total` that need no more work, `before` of them from an earlier run.  seconds: since start."""

    total: int
    before: int
    done: int
    successes: int
    failures: int
    errors: int
    frames: int
    seconds: float
    latest: Attempt | None = None

    @property
    def seconds_left(self) -> float:
        made = self.done - self.before
        return self.seconds / made * (self.total - self.done) if made else float("nan")


def collect_episode(env: LiberoEnv, executor: Executor, seed: int) -> Demonstration:
    """One episode from a reset sampled by `seed`: `executor` acts, the expert labels.

    Raises what the expert, the executor or the environment raises.
    """
    observation, _ = env.reset(seed=seed, options={"init_state": "sampled"})
    expert = make_expert(env)
    expert.reset(env.task.language)
    executor.reset(env.task.language, np.random.default_rng([seed, SUITES.index(env.task.suite), env.task.index]))
    images: dict[str, list[np.ndarray]] = {name: [] for name in observation["images"]}
    proprio: dict[str, list[np.ndarray]] = {name: [] for name in ("eef_pos", "eef_quat", "gripper_qpos", "joint_pos")}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in ("actions", "executed", "states", "targets")}
    phases: list[str] = []
    done = success = False
    while not done:
        seen = env.observation_for_policy(observation)
        label = np.asarray(expert.act(seen).action, np.float64)
        action = executor.executed(label, seen, len(phases))
        for name, image in observation["images"].items():
            images[name].append(image)
        for name, values in proprio.items():
            values.append(observation["proprio"][name])
        for name, row in (
            ("actions", label),
            ("executed", action),
            ("states", env.state()),
            ("targets", expert.targets),
        ):
            rows[name].append(row)
        phases.append(expert.phase)
        observation, _, success, truncated, _ = env.step(action)
        done = success or truncated
    names = tuple(dict.fromkeys(phases))
    return Demonstration(
        images={name: np.stack(frames) for name, frames in images.items()},
        proprio={name: np.array(values, np.float64) for name, values in proprio.items()},
        actions=np.array(rows["actions"]),
        executed=np.array(rows["executed"], np.float64),
        states=np.array(rows["states"]),
        targets=np.array(rows["targets"], np.float32),
        phases=np.array([names.index(phase) for phase in phases], np.int8),
        phase_names=names,
        instruction=env.task.language,
        suite=env.task.suite,
        task=env.task.index,
        seed=seed,
        outcome="success" if success else "failure",
        source=executor.source,
        env_args=_env_args(env),
        provenance=env.provenance(),
    )


def _env_args(env: LiberoEnv) -> dict[str, Any]:
    """What robomimic makes the environment from, as LIBERO writes it."""
    problem = env.privileged().domain.parsed_problem["problem_name"]
    bddl = f"{env.task.bddl_file.parent.name}/{env.task.bddl_file.name}"
    names = list(env.config.cameras)
    size = env.config.image_size
    return {
        "type": 1,
        "env_name": problem,
        "problem_name": problem,
        "bddl_file": bddl,
        "env_kwargs": {
            "robots": ["Panda"],
            "camera_names": names,
            "camera_heights": size,
            "camera_widths": size,
            "control_freq": 20,
            "bddl_file_name": bddl,
        },
    }


class Collector:
    """What a worker process runs: episodes of one task at a time, in one environment."""

    def __init__(self, config: CollectConfig, root: Path) -> None:
        self._config, self._folder = config, SuiteFolder(root, config.suite)
        self._env: LiberoEnv | None = None
        self._executor: Executor = NoisyExpert(config.noise)

    def __call__(self, job: tuple[int, int]) -> Attempt:
        """Makes, and writes, the episode (task, seed). A fault of the episode is an outcome.

        Raises ConfigurationError: the expert cannot do the task.  Raises OSError: the file cannot be written.
        """
        task, seed = job
        env = self._environment(task)
        try:
            demonstration = collect_episode(env, self._executor, seed)
        except ConfigurationError:
            raise
        except Exception:  # of the simulator, the expert or a policy: reported with its traceback
            self.close()
            return Attempt(task, seed, "error", 0, False, traceback.format_exc())
        kept = demonstration.success or self._executor.keeps_failures
        if kept:
            write_demonstration(self._folder.episode(task, seed), demonstration, self._config.images)
        return Attempt(task, seed, demonstration.outcome, len(demonstration.actions), kept)

    def _environment(self, task: int) -> LiberoEnv:
        if self._env is None or self._env.task.index != task:
            self.close()
            self._env = LiberoEnv(self._config.env(task))
        return self._env

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None


def collect(
    config: CollectConfig,
    out: Path,
    workers: int = 2,
    progress: Callable[[Progress], None] = lambda _: None,
    episode_limit: float = 600.0,
) -> Progress:
    """Collects what is missing in `out`, see `sim.dataset` for what lies where, and returns how it went.

    An episode that raises, hangs for `episode_limit` seconds, or takes its process with it is an error in the manifest,
    tried again by the next run; one that fails is not.
    Raises ConfigurationError: other settings than the folder's, a folder in use, or a task that the expert cannot do.
    Raises OSError: a file cannot be written.  Raises PolicyError: a file in the folder is damaged. Whatever it raises,
    finished episodes stay.
    """
    if workers < 1:
        raise ConfigurationError(f"workers is {workers}: it must be at least 1")
    folder = SuiteFolder(out, config.suite)
    with folder.locked():
        folder.begin(config.settings())
        seeds = range(config.seed, config.seed + config.episodes)
        finished = {task: folder.finished(task) for task in config.tasks}
        units = [
            [(task, seed) for seed in seeds[first : first + config.turn] if seed not in finished[task]]
            for first in range(0, config.episodes, config.turn)
            for task in config.tasks
        ]
        units = [unit for unit in units if unit]
        total = len(seeds) * len(config.tasks)
        before = total - sum(map(len, units))
        started = time.monotonic()
        counts = {"success": 0, "failure": 0, "error": 0}
        done, frames = before, 0

        def state(latest: Attempt | None) -> Progress:
            return Progress(
                total,
                before,
                done,
                counts["success"],
                counts["failure"],
                counts["error"],
                frames,
                time.monotonic() - started,
                latest,
            )

        progress(state(None))
        try:
            for attempt in _attempts(config, out, units, workers, episode_limit):
                done += 1
                counts[attempt.outcome] += 1
                frames += attempt.steps if attempt.kept else 0
                folder.record(attempt)
                progress(state(attempt))
        finally:
            folder.summarise(config.tasks)
        return state(None)


def _attempts(
    config: CollectConfig, out: Path, units: list[list[tuple[int, int]]], workers: int, limit: float
) -> Iterator[Attempt]:
    with Pool("sim.collect", "Collector", (config, out), workers, limit) as pool:
        for job, answer in pool.run(units):
            task, seed = job
            yield answer if isinstance(answer, Attempt) else Attempt(task, seed, "error", 0, False, str(answer))
