"""One episode of one policy: success, failure, or an error that is neither."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from mllm.policy import ActionSpec, Observation, Policy
from mllm.recording import Recording
from sim.errors import ConfigurationError
from sim.tasks import TaskSpec

Outcome = Literal["success", "failure", "error"]
TIMED = ("policy", "physics", "render")


class Environment(Protocol):
    """What a rollout needs: `sim.env.LiberoEnv`, or the same in a worker process (`sim.supervisor`)."""

    task: TaskSpec

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]: ...

    def step(self, action: np.ndarray, look: bool = True) -> tuple[Any, float, bool, bool, dict[str, Any]]: ...

    def observation_for_policy(self, observation: dict[str, Any]) -> Observation: ...

    def state(self) -> np.ndarray: ...

    def provenance(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class Episode:
    """What happened.

    init_state: number of the official initial state, or "sampled".  seed: None is the environment's own.
    outcome: "error" where the policy or the environment raised; an error says nothing about the policy's skill.
    steps: control steps taken, T.  actions: (T, 7) float32.
    timing: stage -> (T,) float64 seconds.
    states: (T + 1, 1 + nq + nv) float64, before the first action and after each; None where not asked for.
        An error may cut it short.
    error: the traceback, or None.  provenance: see `sim.versions`.
    """

    suite: str
    task: int
    language: str
    init_state: int | str
    seed: int | None
    outcome: Outcome
    steps: int
    actions: np.ndarray
    timing: dict[str, np.ndarray]
    states: np.ndarray | None = None
    error: str | None = None
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.outcome not in ("success", "failure", "error"):
            raise ConfigurationError(f"Episode.outcome is {self.outcome!r}: choose success, failure or error")
        if (self.outcome == "error") != (self.error is not None):
            raise ConfigurationError(
                f"an episode with outcome {self.outcome!r} has error {self.error!r}: one needs the other"
            )
        if self.actions.shape != (self.steps, 7) or self.actions.dtype != np.float32:
            raise ConfigurationError(
                f"Episode.actions is {self.actions.dtype} {self.actions.shape}: it must be float32 ({self.steps}, 7)"
            )

    def recording(self) -> Recording:
        """The actions with everything that names the episode. Raises PolicyError: no action was taken."""
        named = {
            "suite": self.suite,
            "task": str(self.task),
            "instruction": self.language,
            "init_state": str(self.init_state),
            "seed": "" if self.seed is None else str(self.seed),
            "outcome": self.outcome,
        }
        return Recording(self.actions, {**self.provenance, **named})


def rollout(
    env: Environment,
    policy: Policy,
    init_state: int | str = 0,
    seed: int | None = None,
    record_states: bool = False,
) -> Episode:
    """Plays one episode. An exception of the policy or the environment becomes the outcome "error".

    Actions are float32 from policy to simulator, as they are on the ROS wire.
    Raises ConfigurationError before the first step: unknown initial state, or a policy whose actions mean something
    else than LIBERO's. KeyboardInterrupt passes through.
    """
    if policy.action_spec != ActionSpec():
        raise ConfigurationError(
            f"the policy's actions are {policy.action_spec}; LIBERO takes {ActionSpec()}: convert them in the policy"
        )
    actions: list[np.ndarray] = []
    states: list[np.ndarray] = []
    timing: dict[str, list[float]] = {stage: [] for stage in TIMED}
    outcome: Outcome = "failure"
    error: str | None = None
    provenance: dict[str, str] = {}
    try:
        observation, _ = env.reset(seed=seed, options={"init_state": init_state})
        provenance = env.provenance()
        if record_states:
            states.append(env.state())
        policy.reset(env.task.language)
        done = False
        while not done:
            started = time.perf_counter()
            answer = policy.act(env.observation_for_policy(observation))
            elapsed = time.perf_counter() - started
            action = np.array(answer.action, dtype=np.float32)
            observation, _, success, truncated, info = env.step(action, look=answer.looks)
            actions.append(action)
            for stage, seconds in (("policy", elapsed), *info["timing"].items()):
                timing[stage].append(seconds)
            if record_states:
                states.append(env.state())
            outcome = "success" if success else "failure"
            done = success or truncated
    except ConfigurationError:
        if not provenance:
            raise
        outcome, error = "error", traceback.format_exc()
    except Exception:  # any fault of a policy or a simulator is an outcome, reported with its traceback
        outcome, error = "error", traceback.format_exc()
    return Episode(
        suite=env.task.suite,
        task=env.task.index,
        language=env.task.language,
        init_state=init_state,
        seed=seed,
        outcome=outcome,
        steps=len(actions),
        actions=np.array(actions, np.float32).reshape(-1, 7),
        timing={stage: np.array(seconds[: len(actions)]) for stage, seconds in timing.items()},
        states=np.array(states) if record_states else None,
        error=error,
        provenance=provenance,
    )
