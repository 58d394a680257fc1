"""Any policy, with action reuse around it: on a reuse it is not called at all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from mllm.errors import PolicyError
from mllm.policy import ActionStep, BatchedPolicy, Observation, Policy
from mllm.reuse import ActionReuse, ReuseConfig


@dataclass(frozen=True)
class Turn:
    """One step of one episode: what was decided, and what goes into the answer. action: (7,), None where computed."""

    memories: ActionReuse
    action: np.ndarray | None
    timing: dict[str, float]
    flags: dict[str, Any]

    @classmethod
    def begin(cls, memories: ActionReuse, observation: Observation) -> Turn:
        if memories.config.mode == "off":
            return cls(memories, None, {}, {})
        started = time.perf_counter()
        decision, action = memories.decide(observation.images)
        flags = {"reuse": action is not None, **({} if decision is None else decision.flags)}
        return cls(memories, action, {"reuse": time.perf_counter() - started}, flags)

    def reused(self) -> ActionStep:
        assert self.action is not None
        return ActionStep(self.action, self.timing, self.flags)

    def computed(self, step: ActionStep) -> ActionStep:
        self.memories.computed(step)
        if not self.flags:
            return step
        looks = step.looks or self.memories.config.mode == "gated"  # the gate sees every frame
        return replace(step, timing={**step.timing, **self.timing}, flags={**step.flags, **self.flags}, looks=looks)


class ReusePolicy:
    """`policy` under `mllm.reuse`; what it has beside the interface (`render`, `warm_up`, ...) stays reachable.

    It needs nothing of the policy, and takes what it exposes: `ActionStep.kept` and `layout`, and from one that
    predicts several actions `plan` and `left`. Off, every step is the policy's own.
    flags: "reuse", whether the action was; where that was decided "reuse_reason", "reuse_angle" (degrees),
    "reuse_overlap" and "reuse_surprise" (grey levels).  timing: "reuse" is the decision, gate included.
    """

    def __init__(self, policy: Policy, config: ReuseConfig) -> None:
        self._policy = policy
        self.action_spec = policy.action_spec
        self._reuse = self._memories(config)
        self.reuse = config

    def __getattr__(self, name: str) -> Any:
        # Before __init__ is through, as in a copy being made, there is no policy to ask.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._policy, name)

    def _memories(self, config: ReuseConfig) -> ActionReuse:
        return ActionReuse(config, getattr(self._policy, "layout", None))

    def reset(self, instruction: str) -> None:
        self._policy.reset(instruction)
        self._reuse = self._memories(self.reuse)

    def act(self, observation: Observation) -> ActionStep:
        turn = Turn.begin(self._reuse, observation)
        return turn.reused() if turn.action is not None else turn.computed(self._policy.act(observation))

    def clear(self) -> None:
        """A command was not carried out as proposed: what is remembered says nothing about the robot any more."""
        self._reuse.clear()
        if clear := getattr(self._policy, "clear", None):
            clear()

    def configure(self, **options: Any) -> None:
        """See `mllm.policy.Tunable`: "reuse", and what the policy itself can change."""
        reuse = options.pop("reuse", None)
        config = self.reuse if reuse is None else ReuseConfig.parse(reuse)
        self._memories(config)  # says what is wrong before anything has changed
        if options:
            configure = getattr(self._policy, "configure", None)
            if configure is None:
                raise PolicyError(f"this policy cannot change {', '.join(sorted(options))} while it acts")
            configure(**options)
        if options or config != self.reuse:
            # Another object, even of the same rule: by that every episode under way sees that it is to forget.
            self.reuse = replace(config)
            self._reuse.configure(self.reuse)


@dataclass
class ReuseEpisode:
    """What is remembered of one of several episodes. inner: what the policy remembers of it."""

    inner: Any
    reuse: ActionReuse


class BatchedReusePolicy(ReusePolicy):
    """`ReusePolicy` of a policy that answers several episodes at once; it is asked about those that are computed."""

    def begin(self, instruction: str) -> ReuseEpisode:
        return ReuseEpisode(cast(BatchedPolicy, self._policy).begin(instruction), self._memories(self.reuse))

    def act_batch(self, episodes: Sequence[ReuseEpisode], observations: Sequence[Observation]) -> list[ActionStep]:
        turns = []
        for episode, observation in zip(episodes, observations, strict=True):
            if episode.reuse.config is not self.reuse:
                episode.reuse.configure(self.reuse)
            turns.append(Turn.begin(episode.reuse, observation))
        asked = [number for number, turn in enumerate(turns) if turn.action is None]
        answers: list[ActionStep] = []
        if asked:
            inner = [episodes[number].inner for number in asked]
            answers = cast(BatchedPolicy, self._policy).act_batch(inner, [observations[number] for number in asked])
        computed = dict(zip(asked, answers, strict=True))
        return [turn.computed(computed[i]) if i in computed else turn.reused() for i, turn in enumerate(turns)]


def with_reuse(policy: Policy, config: ReuseConfig) -> ReusePolicy:
    """The policy with reuse around it; it answers several episodes at once if the policy does."""
    batched = callable(getattr(policy, "begin", None)) and callable(getattr(policy, "act_batch", None))
    return (BatchedReusePolicy if batched else ReusePolicy)(policy, config)
