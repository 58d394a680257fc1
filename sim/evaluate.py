"""Plays many episodes of a policy: environments in processes of their own, the policy in this one.

Each worker is a thread with one environment process. A policy with `begin` and `act_batch` is shared: the thread that
calls `evaluate` answers the observations of all workers in batches. Any other policy is made once for each worker. The
scripted expert runs beside its environment. Results are stored by the calling thread, one transaction an episode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from mllm.policy import BatchedPolicy, Policy, make_policy, provenance_of
from sim.batching import SharedPolicy, is_batched
from sim.crew import Crew
from sim.env import EnvConfig, LiberoEnv
from sim.errors import ConfigurationError
from sim.expert_env import ExpertEnv, RemoteExpert
from sim.ledger import Ledger, Progress
from sim.results import EpisodeKey, EpisodeResult, summarise_flags
from sim.rollout import Environment, rollout
from sim.schedule import make_blocks
from sim.step_log import StepLog, encode_video
from sim.supervisor import SupervisedEnv
from sim.versions import git_commit, package_versions
from sim.world import select_gl

EXPERT = "expert"
EXECUTORS = ("process", "ray")
RENDERING = ("renderer", "image_size", "cameras")


@dataclass(frozen=True)
class EvalConfig:
    """What an episode of this run means. Stored with the run; one that differs is refused when the run goes on.

    policy: name of an installed policy, or "expert".  options: keyword arguments of the policy's constructor.
    renderer, image_size, cameras: None is what the policy's attribute `render` says, else `EnvConfig`'s default; the
    expert, which is blind, gets no camera.
    stepper, settle_steps, step_limit, gl: see `EnvConfig`, whose defaults are OpenVLA's protocol.
    """

    policy: str = "mini"
    options: Mapping[str, Any] = field(default_factory=dict)
    renderer: str | None = None
    image_size: int | None = None
    cameras: tuple[str, ...] | None = None
    stepper: str = "fast"
    settle_steps: int = 10
    step_limit: int | None = None
    gl: str | None = None

    def env(self, policy: Policy | None) -> EnvConfig:
        """How environments are built (suite and task aside). Warns where that is not what `policy` asks for."""
        asked: Mapping[str, Any] = dict(getattr(policy, "render", None) or {})
        if policy is None:
            asked = {"cameras": (), "renderer": "fast"}
        if unknown := set(asked) - set(RENDERING):
            raise ConfigurationError(
                f"policy '{self.policy}' asks for rendering with {unknown.pop()!r}: known are {', '.join(RENDERING)}"
            )
        wanted = {name: getattr(self, name) for name in RENDERING if getattr(self, name) is not None}
        for name, value in wanted.items():
            if policy is not None and name in asked and _plain(asked[name]) != _plain(value):
                warnings.warn(
                    f"policy '{self.policy}' was made for {name} {asked[name]!r} and is evaluated with {value!r}: "
                    "its success may suffer",
                    stacklevel=3,
                )
        rest = {name: getattr(self, name) for name in ("stepper", "settle_steps", "step_limit")}
        return EnvConfig(**{**asked, **wanted, **rest, "gl": select_gl(self.gl)})

    def facts(self, env: EnvConfig, policy: Policy | None) -> dict[str, Any]:
        """The configuration as it is stored: what two results must share to be results of the same thing."""
        known = dataclasses.asdict(env)
        for name in ("suite", "task", "seed"):  # part of every episode's key
            del known[name]
        versions, said = package_versions(), provenance_of(policy)
        return {
            "policy": {"name": self.policy, "options": dict(self.options), **({"provenance": said} if said else {})},
            "env": known,
            "versions": {name: versions[name] for name in ("mujoco", "robosuite", "libero")},
        }


@dataclass(frozen=True)
class Execution:
    """How episodes are played; none of it changes what they mean, only how fast they pass and what is kept.

    workers: environments at once, each a process.  executor: "process" (this machine) or "ray" (a Ray cluster).
    max_batch: observations that a shared policy answers in one call at most. With 1, latency is that of one robot, and
        the same command gives the same actions; a larger batch is faster on a GPU, but its size, which depends on who
        happens to wait, changes the last bits of the numbers.
    in_a_row: episodes of one task that a worker plays before it builds the next task's environment.
    record_failures: keep a video of every failure and error of a policy with cameras.
    retry_errors: play episodes again that the run has as errors.
    error_limit: errors in a row, over all workers, after which the evaluation stops.
    start_limit, call_limit: see `sim.supervisor.SupervisedEnv`.
    """

    workers: int = 2
    executor: str = "process"
    max_batch: int = 1
    in_a_row: int = 5
    record_failures: bool = False
    retry_errors: bool = False
    error_limit: int = 20
    start_limit: float = 180.0
    call_limit: float = 60.0

    def __post_init__(self) -> None:
        for name in ("workers", "max_batch", "in_a_row", "error_limit"):
            if not (isinstance(value := getattr(self, name), int) and 1 <= value <= 4096):
                raise ConfigurationError(f"{name} is {value!r}: it must be an integer from 1 to 4096")
        if self.executor not in EXECUTORS:
            raise ConfigurationError(f"executor is {self.executor!r}: choose one of {', '.join(EXECUTORS)}")


class WorkerEnv(Environment, Protocol):
    """An environment in a process of its own."""

    config: EnvConfig

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any: ...

    def close(self) -> None: ...


EnvFactory = Callable[[EnvConfig], LiberoEnv]


class RolloutPlayer:
    """Plays in-process rollouts, in an environment that is kept for as long as the scene stays the same.

    scene: what an episode needs.  build: an environment of that, in a process of its own.
    agent: who acts in it.  facts: what is added to every result's provenance.
    """

    def __init__(
        self,
        scene: Callable[[EpisodeKey], tuple[EnvConfig, EnvFactory]],
        build: Callable[[EnvConfig, EnvFactory], WorkerEnv],
        agent: Callable[[EpisodeKey, WorkerEnv], Policy],
        facts: Mapping[str, str],
        record_failures: bool = False,
    ) -> None:
        self._scene_of, self._build, self._agent = scene, build, agent
        self._facts, self._record = dict(facts), record_failures
        self._env: WorkerEnv | None = None
        self._scene: tuple[EnvConfig, EnvFactory] | None = None

    def play(self, key: EpisodeKey) -> EpisodeResult:
        env = self._environment(key)
        log = StepLog(self._agent(key, env), frames=self._record and bool(env.config.cameras))
        started = now()
        episode = rollout(env, log, key.init_state, key.seed)
        timing = log.stages(episode.steps)
        stages = {**episode.timing, **timing}
        if "queue" in timing:  # the policy's own time, without waiting for others
            stages["policy"] = episode.timing["policy"] - np.nan_to_num(timing["queue"])
        return EpisodeResult(
            key=key,
            language=episode.language,
            outcome=episode.outcome,
            steps=episode.steps,
            started=started,
            finished=now(),
            actions=episode.actions,
            timing=stages,
            flags=summarise_flags(log.flags[: episode.steps]),
            provenance=_together(episode.provenance, self._facts),
            error=episode.error,
            video=encode_video(log.frames) if log.frames and episode.outcome != "success" else None,
        )

    def _environment(self, key: EpisodeKey) -> WorkerEnv:
        scene = self._scene_of(key)
        if self._env is None or scene != self._scene:
            self.close()
            self._env, self._scene = self._build(*scene), scene
        return self._env

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
        self._env = None


def now() -> str:
    """The time as it is stored: ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def circumstances(workers: int, max_batch: int, executor: str) -> dict[str, str]:
    """What an environment's provenance does not say: what latency may depend on, and the commit of what answers."""
    facts = {"workers": str(workers), "max_batch": str(max_batch), "executor": executor, "git_commit": git_commit()}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        facts["torch"] = importlib.metadata.version("torch")
    return facts


@dataclass(frozen=True)
class _Side:
    """What plays the episodes of a variant. policy: None is the expert.  env: suite and task aside."""

    config: EvalConfig
    policy: Policy | None
    env: EnvConfig

    @classmethod
    def of(cls, config: EvalConfig, policy: Policy | None) -> _Side:
        if policy is None and config.policy != EXPERT:
            policy = make_policy(config.policy, **config.options)
        return cls(config, policy, config.env(policy))

    def scene(self, key: EpisodeKey) -> tuple[EnvConfig, EnvFactory]:
        return dataclasses.replace(self.env, suite=key.suite, task=key.task), LiberoEnv if self.policy else ExpertEnv


def evaluate(
    path: Path | str,
    config: EvalConfig | Mapping[str, EvalConfig],
    keys: Sequence[EpisodeKey],
    execution: Execution | None = None,
    policy: Policy | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Progress:
    """Plays those of `keys` that the run at `path` lacks, and stores each as it ends.

    config: of all episodes, or of each variant, whose policies then are in memory all together.
    policy: the one to use; None makes those that `config` names.
    on_progress: called at the start and after every episode.
    Raises ConfigurationError, PolicyError: it cannot be played as asked, or the run has another configuration.
    Raises SimError: too many errors in a row.  Raises ResultError: the file cannot be written.
    Whatever ends it, finished episodes are in the file, and the same call goes on from there.
    """
    execution = execution or Execution()
    if isinstance(config, EvalConfig):
        sides = dict.fromkeys((key.variant for key in keys), _Side.of(config, policy))
    else:
        sides = {variant: _Side.of(own, policy) for variant, own in config.items()}
    facts = circumstances(execution.workers, execution.max_batch, execution.executor)
    meant = {variant: side.config.facts(side.env, side.policy) for variant, side in sides.items()}
    with Ledger(path, meant, keys, execution.retry_errors, execution.error_limit, on_progress) as ledger:
        crew = Crew(ledger.store, execution.max_batch)

        def scene(key: EpisodeKey) -> tuple[EnvConfig, EnvFactory]:
            return sides[key.variant].scene(key)

        def build(env: EnvConfig, factory: EnvFactory) -> WorkerEnv:
            return _env_class(execution.executor)(env, execution.start_limit, execution.call_limit, factory)

        def make_player(number: int) -> RolloutPlayer:
            own: dict[str, Policy] = {}

            def agent(key: EpisodeKey, env: WorkerEnv) -> Policy:
                side = sides[key.variant]
                if side.policy is None:
                    return RemoteExpert(env)
                if is_batched(side.policy):
                    return SharedPolicy(cast(BatchedPolicy, side.policy), crew.post)
                if number == 0:
                    return side.policy
                if key.variant not in own:
                    own[key.variant] = _warm(make_policy(side.config.policy, **side.config.options))
                return own[key.variant]

            return RolloutPlayer(scene, build, agent, facts, execution.record_failures)

        for variant in dict.fromkeys(key.variant for key in ledger.missing):
            if (missing := sides[variant].policy) is not None:
                _warm(missing)
        # A policy that was given, and answers one episode at a time, exists once.
        workers = 1 if policy is not None and not is_batched(policy) else execution.workers
        blocks = make_blocks(ledger.missing, execution.in_a_row, workers)
        crew.play(blocks, [make_player(number) for number in range(min(workers, len(blocks)))])
        return ledger.progress


def _env_class(executor: str) -> Callable[..., WorkerEnv]:
    if executor == "ray":
        from sim.ray_env import RayEnv

        return RayEnv
    return SupervisedEnv


def _warm(policy: Policy) -> Policy:
    """Lets the policy do what its first answer would take longer for; see `mllm.policy`."""
    if warm_up := getattr(policy, "warm_up", None):
        warm_up()
    return policy


def _together(env: Mapping[str, str], facts: Mapping[str, str]) -> dict[str, str]:
    """A result's provenance. The policy's commit is that of `facts`; an environment of another one was started later,
    or elsewhere, and its own is "env_git_commit".
    """
    commit = env.get("git_commit", "")
    apart = {"env_git_commit": commit} if commit not in ("", facts.get("git_commit")) else {}
    return {**env, **facts, **apart}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
