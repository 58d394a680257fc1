"""Does a policy use what it is shown? The same policy without sight, or told something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mllm.policy import ActionStep, BatchedPolicy, Observation, make_policy, provenance_of
from sim.batching import is_batched
from sim.errors import ConfigurationError
from sim.tasks import SHUFFLED_SUITES, SUITES, TaskSpec, possible, suite_tasks


class Ablated:
    """`policy` with something taken away. A subclass says what."""

    def __init__(self, policy: str = "mini", options: Mapping[str, Any] | None = None) -> None:
        made = make_policy(policy, **dict(options or {}))
        if not is_batched(made):
            raise ConfigurationError(f"policy '{policy}' has no begin and act_batch: nothing can be taken from it here")
        self._policy: BatchedPolicy = made  # type: ignore[assignment]
        self.action_spec = made.action_spec
        self.render = dict(getattr(made, "render", None) or {})
        self._episode: Any = None

    @property
    def provenance(self) -> dict[str, str]:
        return provenance_of(self._policy)

    def told(self, instruction: str) -> str:
        return instruction

    def shown(self, observation: Observation) -> Observation:
        return observation

    def begin(self, instruction: str) -> Any:
        return self._policy.begin(self.told(instruction))

    def act_batch(self, episodes: Sequence[Any], observations: Sequence[Observation]) -> list[ActionStep]:
        return self._policy.act_batch(episodes, [self.shown(observation) for observation in observations])

    def reset(self, instruction: str) -> None:
        self._episode = self.begin(instruction)

    def act(self, observation: Observation) -> ActionStep:
        return self.act_batch([self._episode], [observation])[0]


class Blind(Ablated):
    """Sees grey images; proprioception stays."""

    def shown(self, observation: Observation) -> Observation:
        return replace(
            observation, images={name: np.full_like(image, 127) for name, image in observation.images.items()}
        )


class Misled(Ablated):
    """Is given the instruction of another task of the same suite, one that its scene allows."""

    def told(self, instruction: str) -> str:
        return other_task(find_language(instruction)).language


def find_language(instruction: str) -> TaskSpec:
    """The first task with that instruction. Raises ConfigurationError: there is none."""
    for suite in SUITES:
        for task in suite_tasks(suite):
            if task.language == instruction:
                return task
    raise ConfigurationError(f"no task of LIBERO has the instruction {instruction!r}")


def other_task(task: TaskSpec) -> TaskSpec:
    """The next task of the suite; of `SHUFFLED_SUITES`, the next that can be followed in its scene.

    Its scenes hold what several tasks are about, so that both instructions make sense there.
    """
    tasks = suite_tasks(task.suite)
    following = [tasks[(task.index + step) % len(tasks)] for step in range(1, len(tasks))]
    if task.suite in SHUFFLED_SUITES:
        following = [other for other in following if other in possible(task)]
    if not following:
        raise ConfigurationError(f"the scene of {task.language!r} holds nothing that another task is about")
    return following[0]
