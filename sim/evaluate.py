"""Plays many episodes of a policy: environments in processes of their own, the policy in this one.

Each worker is a thread with one environment process. A policy with `begin` and `act_batch` is shared: the thread that
calls `evaluate` answers the observations of all workers in batches. Any other policy is made once for each worker. The
scripted expert runs beside its environment. Results are stored by the calling thread, one transaction an episode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from mllm.policy import BatchedPolicy, Policy, make_policy
from sim.batching import Request, SharedPolicy, Stopped, answer, is_batched
from sim.env import EnvConfig, LiberoEnv
from sim.errors import ConfigurationError, SimError
from sim.expert_env import ExpertEnv, RemoteExpert
from sim.results import EpisodeKey, EpisodeResult, RunFile, summarise_flags
from sim.rollout import Environment, rollout
from sim.schedule import make_blocks
from sim.step_log import StepLog, encode_video
from sim.supervisor import SupervisedEnv
from sim.versions import package_versions
from sim.world import select_gl

EXPERT = "expert"
EXECUTORS = ("process", "ray")
_LEAVE_LIMIT = 15.0  # s that workers have to end after a stop
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
        versions = package_versions()
        return {
            "policy": {"name": self.policy, "options": dict(self.options), **_policy_facts(policy)},
            "env": known,
            "versions": {name: versions[name] for name in ("mujoco", "robosuite", "libero")},
        }


@dataclass(frozen=True)
class Execution:
    """How episodes are played; none of it changes what they mean, only how fast they pass and what is kept.

    workers: environments at once, each a process.  executor: "process" (this machine) or "ray" (a Ray cluster).
    max_batch: observations that a shared policy answers in one call at most. A larger batch can change the last bits
        of its numbers: 1 gives the same actions whatever the number of workers.
    in_a_row: episodes of one task that a worker plays before it builds the next task's environment.
    record_failures: keep a video of every failure and error of a policy with cameras.
    retry_errors: play episodes again that the run has as errors.
    error_limit: errors in a row, over all workers, after which the evaluation stops.
    start_limit, call_limit: see `sim.supervisor.SupervisedEnv`.
    """

    workers: int = 2
    executor: str = "process"
    max_batch: int = 64
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


class Player(Protocol):
    """Plays an episode at a time. Raises ConfigurationError: nothing can be played like this."""

    def play(self, key: EpisodeKey) -> EpisodeResult: ...

    def close(self) -> None: ...


class RolloutPlayer:
    """Plays in-process rollouts, in an environment that is kept for as long as the task stays the same.

    make_env: a task's environment, in a process of its own.  make_agent: the policy that acts in it.
    facts: what is added to every result's provenance.
    """

    def __init__(
        self,
        make_env: Callable[[EpisodeKey], SupervisedEnv],
        make_agent: Callable[[SupervisedEnv], Policy],
        facts: Mapping[str, str],
        record_failures: bool = False,
    ) -> None:
        self._make_env, self._make_agent = make_env, make_agent
        self._facts, self._record = dict(facts), record_failures
        self._env: SupervisedEnv | None = None
        self._agent: Policy | None = None

    def play(self, key: EpisodeKey) -> EpisodeResult:
        env = self._environment(key)
        if self._agent is None:
            self._agent = self._make_agent(env)
        log = StepLog(self._agent, frames=self._record)
        started = now()
        episode = rollout(cast(Environment, env), log, key.init_state, key.seed)
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
            provenance={**self._facts, **episode.provenance},
            error=episode.error,
            video=encode_video(log.frames) if log.frames and episode.outcome != "success" else None,
        )

    def _environment(self, key: EpisodeKey) -> SupervisedEnv:
        if self._env is None or (self._env.task.suite, self._env.task.index) != (key.suite, key.task):
            self.close()
            self._env = self._make_env(key)
        return self._env

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
        self._env = self._agent = None


@dataclass
class Progress:
    """Where an evaluation stands. started: monotonic s.  before: episodes that the run had when it began."""

    planned: Sequence[EpisodeKey]
    outcomes: dict[EpisodeKey, str]
    languages: dict[tuple[str, int], str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    before: int = 0

    @property
    def done(self) -> int:
        return len(self.outcomes)

    def seconds_left(self) -> float:
        """At the rate so far; NaN before the first episode."""
        played = self.done - self.before
        if not played:
            return float("nan")
        return (len(self.planned) - self.done) * (time.monotonic() - self.started) / played


def now() -> str:
    """The time as it is stored: ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def evaluate(
    path: Path | str,
    config: EvalConfig,
    keys: Sequence[EpisodeKey],
    execution: Execution | None = None,
    policy: Policy | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Progress:
    """Plays those of `keys` that the run at `path` lacks, and stores each as it ends.

    policy: the one to use; None makes the one that `config` names.
    on_progress: called at the start and after every episode.
    Raises ConfigurationError, PolicyError: it cannot be played as asked, or the run has another configuration.
    Raises SimError: too many errors in a row.  Raises ResultError: the file cannot be written.
    Whatever ends it, finished episodes are in the file, and the same call goes on from there.
    """
    execution = execution or Execution()
    own = [policy] if policy is not None else []
    expert = config.policy == EXPERT and policy is None
    if not own and not expert:
        own.append(make_policy(config.policy, **config.options))
    first = own[0] if own else None
    env = config.env(first)
    facts = {**_versions(), "workers": str(execution.workers), "executor": execution.executor}
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def make_env(key: EpisodeKey) -> SupervisedEnv:
        task = dataclasses.replace(env, suite=key.suite, task=key.task)
        factory: Callable[[EnvConfig], LiberoEnv] = ExpertEnv if expert else LiberoEnv
        return _env_class(execution.executor)(task, execution.start_limit, execution.call_limit, factory)

    def make_agents() -> Callable[[SupervisedEnv], Policy]:
        if expert:
            return RemoteExpert
        if is_batched(first):
            return lambda _: SharedPolicy(cast(BatchedPolicy, first), messages.put)
        agent = own.pop() if own else make_policy(config.policy, **config.options)
        return lambda _: agent

    def make_player() -> Player:
        return RolloutPlayer(make_env, make_agents(), facts, execution.record_failures and bool(env.cameras))

    batched = cast(BatchedPolicy, first) if first is not None and is_batched(first) else None
    return play_all(path, config.facts(env, first), keys, execution, make_player, on_progress, batched, messages)


def play_all(
    path: Path | str,
    configuration: Mapping[str, Any],
    keys: Sequence[EpisodeKey],
    execution: Execution,
    make_player: Callable[[], Player],
    on_progress: Callable[[Progress], None] = lambda _: None,
    batched: BatchedPolicy | None = None,
    messages: queue.SimpleQueue[Any] | None = None,
) -> Progress:
    """`evaluate`, whatever plays an episode.

    make_player: makes one worker's; called here, used in the worker's thread.
    messages, batched: where players' requests to a shared policy arrive, and who answers them.
    """
    with RunFile(path, write=True) as run:
        for variant in dict.fromkeys(key.variant for key in keys):
            run.configure(variant, configuration)
        known = run.outcomes()
        outcomes = {
            key: known[key] for key in keys if key in known and not (execution.retry_errors and known[key] == "error")
        }
        progress = Progress(keys, outcomes, before=len(outcomes))
        on_progress(progress)
        missing = [key for key in keys if key not in outcomes]
        if missing:
            _Crew(run, execution, progress, on_progress, batched, messages or queue.SimpleQueue()).play(
                make_blocks(missing, execution.in_a_row, execution.workers), make_player
            )
        return progress


@dataclass
class _Left:
    """A worker's last word: what ended it, or None where there was nothing left to play."""

    error: BaseException | None


class _Crew:
    """The workers of one evaluation, and the thread that serves them."""

    def __init__(
        self,
        run: RunFile,
        execution: Execution,
        progress: Progress,
        on_progress: Callable[[Progress], None],
        batched: BatchedPolicy | None,
        messages: queue.SimpleQueue[Any],
    ) -> None:
        self._run, self._execution = run, execution
        self._progress, self._on_progress = progress, on_progress
        self._batched, self._messages = batched, messages
        self._stopping = threading.Event()
        self._errors_in_a_row = 0
        self._at_work = 0
        self._requests: list[Request] = []

    def play(self, blocks: list[list[EpisodeKey]], make_player: Callable[[], Player]) -> None:
        waiting = deque(blocks)
        players = [make_player() for _ in range(min(self._execution.workers, len(blocks)))]
        for player in players:
            threading.Thread(target=self._work, args=(player, waiting), name="episodes", daemon=True).start()
            self._at_work += 1
        try:
            while self._at_work:
                self._receive()
                if self._requests:
                    assert self._batched is not None, "only a shared policy's episodes ask"
                    answer(self._batched, self._requests, self._execution.max_batch)
                    self._requests.clear()
        finally:
            self._stop()

    def _work(self, player: Player, waiting: deque[list[EpisodeKey]]) -> None:
        error: BaseException | None = None
        try:
            while waiting and not self._stopping.is_set():
                try:
                    block = waiting.popleft()
                except IndexError:  # another worker took the last one
                    break
                for key in block:
                    if self._stopping.is_set():
                        break
                    self._messages.put(player.play(key))
        except Stopped:
            pass
        except BaseException as fault:  # raised again by the thread that evaluates
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
                self._store(message)
            else:
                self._at_work -= 1
                if message.error is not None and not self._stopping.is_set():
                    raise message.error
            message = None if self._messages.empty() else self._messages.get()

    def _store(self, result: EpisodeResult) -> None:
        if self._stopping.is_set() and result.outcome == "error":
            return  # the stop may be what broke it
        self._run.add(result)
        self._progress.outcomes[result.key] = result.outcome
        self._progress.languages[result.key.suite, result.key.task] = result.language
        self._on_progress(self._progress)
        self._errors_in_a_row = self._errors_in_a_row + 1 if result.outcome == "error" else 0
        if self._errors_in_a_row >= self._execution.error_limit and not self._stopping.is_set():
            raise SimError(
                f"the evaluation stopped after {self._errors_in_a_row} errors in a row; what was finished is in "
                f"{self._run.path}. The last one, {result.key}:\n{result.error}"
            )

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


def _env_class(executor: str) -> type[SupervisedEnv]:
    if executor == "ray":
        from sim.ray_env import RayEnv

        return RayEnv
    return SupervisedEnv


def _policy_facts(policy: Policy | None) -> dict[str, Any]:
    """What a policy says about itself in its optional attribute `provenance` (a checkpoint's digest)."""
    facts = dict(getattr(policy, "provenance", None) or {})
    return {"provenance": {str(name): str(value) for name, value in facts.items()}} if facts else {}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _versions() -> dict[str, str]:
    import importlib.metadata

    try:
        return {"torch": importlib.metadata.version("torch")}
    except importlib.metadata.PackageNotFoundError:
        return {}
