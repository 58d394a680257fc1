"""A policy acts and the expert says what it should have done: DAgger (Ross, Gordon and Bagnell, 2011)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mllm.policy import ActionSpec, Observation, check_action, make_policy, provenance_of
from sim.errors import ConfigurationError


@dataclass(frozen=True)
class PolicyMix:
    """Which policy acts, and how much the expert helps.

    policy, options: for `mllm.policy.make_policy`; options are JSON values.
    beta: share of the episodes in which the expert takes over for stretches of `stretch` steps, one in two at random,
    so that states late in a task are seen while the policy does not get there by itself. The numbers are our choice.
    """

    policy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    beta: float = 0.5
    stretch: tuple[int, int] = (5, 25)

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ConfigurationError(f"PolicyMix.beta is {self.beta}: it must be from 0 to 1")
        if not 1 <= self.stretch[0] <= self.stretch[1]:
            raise ConfigurationError(f"PolicyMix.stretch is {self.stretch}: it must be two counts of steps, from 1 on")

    def provenance(self) -> dict[str, str]:
        """What the policy says about itself, such as which weights it has. Raises PolicyError: it cannot be made."""
        return provenance_of(make_policy(self.policy, **self.options))


class MixedPolicy:
    """Executes the policy's actions, and the expert's for stretches of some episodes.

    Every episode is kept: the labels are right whether or not it succeeds.
    Raises PolicyError: the policy cannot be made.  Raises ConfigurationError: its actions mean something else.
    """

    source = "dagger"
    keeps_failures = True

    def __init__(self, mix: PolicyMix) -> None:
        self._mix = mix
        self._policy = make_policy(mix.policy, **mix.options)
        if self._policy.action_spec != ActionSpec():
            raise ConfigurationError(
                f"the actions of policy {mix.policy!r} are {self._policy.action_spec}; LIBERO takes {ActionSpec()}: "
                "convert them in the policy"
            )

    def reset(self, instruction: str, rng: np.random.Generator) -> None:
        self._policy.reset(instruction)
        self._rng = rng
        self._mixed = bool(rng.random() < self._mix.beta)
        self._left, self._helps = 0, False

    def executed(self, expert: np.ndarray, observation: Observation, step: int) -> np.ndarray:
        if self._mixed:
            if self._left == 0:
                self._left = int(self._rng.integers(*self._mix.stretch, endpoint=True))
                self._helps = bool(self._rng.random() < 0.5)
            self._left -= 1
        # The policy is asked all the same: one that remembers what it saw must see everything.
        action = check_action(self._policy.act(observation).action)
        return expert if self._helps else action
