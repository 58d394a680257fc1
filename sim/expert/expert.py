"""What the scripted experts have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from mllm.policy import ActionSpec, ActionStep, Observation
from sim.env import LiberoEnv
from sim.errors import ConfigurationError
from sim.expert.hand import Hand


class Expert(ABC):
    """A policy with privileged access to an environment, whose action follows from the simulator's state now.

    So it can say what to do in a state that another policy got into (DAgger, Ross et al. 2011), and one frame is enough
    to learn its answer from. It ignores what it observes.

    phase: what it is doing, in a word. It only describes the last action.
    """

    action_spec = ActionSpec()

    def __init__(self, env: LiberoEnv, hand: Hand | None = None) -> None:
        self.phase = "none"
        self._env = env
        self._hand = hand or Hand(env, self.action_spec)
        self._ready = False

    def reset(self, instruction: str) -> None:
        """Plans the episode from the state now. Raises EnvironmentFault: there is no way to do the task."""
        self.phase = "none"
        self._hand.look()
        self.prepare()
        self._ready = True

    def act(self, observation: Observation) -> ActionStep:
        """The action for the state now; `observation` is not read. Raises ConfigurationError: `reset` comes first."""
        if not self._ready:
            raise ConfigurationError("the expert has no plan: call reset() before act()")
        self._hand.look()
        return ActionStep(self.decide(), flags={"phase": self.phase})

    @property
    @abstractmethod
    def targets(self) -> np.ndarray:
        """(6,) m, world frame, in the state of the last action: from the hand to where it takes hold now, and from the
        hand to where what it takes hold of goes. What a policy must find in the images to act as the expert does.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Plans from the state that the hand looked at last. Raises EnvironmentFault: there is no plan."""

    @abstractmethod
    def decide(self) -> np.ndarray:
        """(7,) float32, the action for the state that the hand looked at last. Sets `phase`."""

    @abstractmethod
    def done(self) -> bool:
        """Whether, in that state, nothing is left to do, and the hand is free for something else."""

    @abstractmethod
    def holding(self) -> bool:
        """Whether, in that state, the hand has what it moves."""
