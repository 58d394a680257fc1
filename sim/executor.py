"""What is executed while the expert is asked what it would do: its own action, disturbed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mllm.policy import Observation


class Executor(Protocol):
    """Decides what is done in each step of an episode whose labels are the expert's.

    source: recorded with every demonstration.  keeps_failures: whether an episode that fails is kept too.
    """

    source: str
    keeps_failures: bool

    def reset(self, instruction: str, rng: np.random.Generator) -> None:
        """Starts an episode; every draw in it comes from `rng`."""
        ...

    def executed(self, expert: np.ndarray, observation: Observation, step: int) -> np.ndarray:
        """The action to execute, (7,) in [-1, 1].  expert: (7,), its action in this state, which is the label."""
        ...


@dataclass(frozen=True)
class Noise:
    """How the expert is disturbed, so that demonstrations show how to come back (DART, Laskey et al. 2017).

    All numbers are our choice. Actions are in units of `mllm.policy.ActionSpec`; rates are chances in a step.
    clean: share of episodes without any.
    kicked: share of the others that start with `kick_steps` steps in one direction, each axis within `kick`.
    burst_rate: of a burst of `burst_steps` steps, in which u' = decay u + N(0, translation) is added to the
    translation, and in the share `turning` of them N(0, rotation) in the same way to the rotation.
    slip_rate: of the gripper opening for `slip_steps` steps when it should close, so that it must grasp again.
    """

    clean: float = 0.25
    kicked: float = 0.5
    kick: float = 0.8
    kick_steps: tuple[int, int] = (2, 8)
    burst_rate: float = 0.06
    burst_steps: tuple[int, int] = (6, 15)
    decay: float = 0.85
    translation: float = 0.18
    rotation: float = 0.05
    turning: float = 0.3
    slip_rate: float = 0.008
    slip_steps: tuple[int, int] = (1, 4)


class NoisyExpert:
    """Executes the expert's actions under `Noise`."""

    source = "expert"
    keeps_failures = False

    def __init__(self, noise: Noise | None = None) -> None:
        self.noise = noise or Noise()

    def reset(self, instruction: str, rng: np.random.Generator) -> None:
        noise = self.noise
        self._rng = rng
        self._clean = bool(rng.random() < noise.clean)
        self._kick = rng.uniform(-noise.kick, noise.kick, 3)
        self._kick_left = self._steps(noise.kick_steps) if rng.random() < noise.kicked else 0
        self._burst_left = self._slip_left = 0
        self._push = np.zeros(6)
        self._spread = np.zeros(6)

    def _steps(self, limits: tuple[int, int]) -> int:
        return int(self._rng.integers(limits[0], limits[1], endpoint=True))

    def executed(self, expert: np.ndarray, observation: Observation, step: int) -> np.ndarray:
        action = np.array(expert, np.float64)
        if self._clean:
            return action
        noise, rng = self.noise, self._rng
        if step < self._kick_left:
            action[:3], action[6] = self._kick, -1.0
            return action
        if self._burst_left == 0 and rng.random() < noise.burst_rate:
            self._burst_left = self._steps(noise.burst_steps)
            self._push = np.zeros(6)
            self._spread = np.repeat([noise.translation, noise.rotation * (rng.random() < noise.turning)], 3)
        if self._burst_left:
            self._burst_left -= 1
            self._push = noise.decay * self._push + rng.normal(size=6) * self._spread
            action[:6] += self._push
        if self._slip_left == 0 and action[6] > 0 and rng.random() < noise.slip_rate:
            self._slip_left = self._steps(noise.slip_steps)
        if self._slip_left:
            self._slip_left -= 1
            action[6] = -1.0
        return np.clip(action, -1.0, 1.0)
