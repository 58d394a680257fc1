"""What an environment that runs in another process, here or elsewhere, has in common with one that does not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from mllm.policy import Observation
from sim.env import EnvConfig
from sim.tasks import find_task


class RemoteEnv(ABC):
    """The calls of `LiberoEnv`, which `call` passes on."""

    def __init__(self, config: EnvConfig | None) -> None:
        self.config = config or EnvConfig()
        self.task = find_task(self.config.suite, self.config.task)
        self._stamp = 0.0

    @abstractmethod
    def begin(self) -> None:
        """Makes the environment where there is none. Raises as `call` does."""

    @abstractmethod
    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """What any method of the environment returns.

        Raises ConfigurationError: the method did.  Raises EnvironmentFault: there is no environment, or it is lost.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends the environment; a second call does nothing."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """See `LiberoEnv.reset`; makes an environment where there is none."""
        self.begin()
        observation, info = self.call("reset", seed=seed, options=options)
        self._stamp = info["stamp"]
        self.task = self.config.episode_task(seed, options)
        return observation, info

    def step(self, action: np.ndarray, look: bool = True) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """See `LiberoEnv.step`."""
        answer = self.call("step", action, look)
        self._stamp = answer[-1]["stamp"]
        return answer

    def observation_for_policy(self, observation: dict[str, Any]) -> Observation:
        """See `LiberoEnv.observation_for_policy`."""
        return Observation(images=observation["images"], proprio=observation["proprio"], stamp=self._stamp)

    def state(self) -> np.ndarray:
        """See `LiberoEnv.state`."""
        return self.call("state")

    def provenance(self) -> dict[str, str]:
        """See `LiberoEnv.provenance`."""
        return self.call("provenance")
