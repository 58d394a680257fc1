"""An environment that takes no time, for tests of what surrounds environments; it runs in real worker processes."""

from __future__ import annotations

from typing import Any

import numpy as np

from mllm.policy import Observation
from sim.env import EnvConfig
from sim.errors import ConfigurationError


class ToyEnv:
    """Even initial states are solved in the step after an action whose first number is above 0.25; odd ones never."""

    def __init__(self, config: EnvConfig) -> None:
        if "nowhere" in config.cameras:
            raise ConfigurationError("no camera is called 'nowhere'")
        self.config, self._steps, self._even = config, 0, False

    def _observation(self) -> dict[str, Any]:
        size = self.config.image_size
        image = np.full((size, size, 3), 40 * self._steps, np.uint8)
        return {"images": dict.fromkeys(self.config.cameras, image), "proprio": {"eef_pos": np.zeros(3)}}

    def _info(self) -> dict[str, Any]:
        return {"stamp": self._steps / 20, "timing": {"physics": 0.25, "render": 0.125}}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self._steps, self._even = 0, (options or {})["init_state"] % 2 == 0
        return self._observation(), self._info()

    def step(self, action: np.ndarray, look: bool = True) -> Any:
        self._steps += 1
        success = bool(self._even and action[0] > 0.25)
        observation = self._observation() if look else {**self._observation(), "images": {}}
        return observation, float(success), success, self._steps >= (self.config.step_limit or 1), self._info()

    def observation_for_policy(self, observation: dict[str, Any]) -> Observation:
        return Observation(observation["images"], observation["proprio"], self._steps / 20)

    def state(self) -> np.ndarray:
        return np.zeros(1)

    def provenance(self) -> dict[str, str]:
        made = {"renderer": self.config.renderer if self.config.cameras else "none", "mujoco": "none"}
        return {**made, "git_commit": "of the toy"}

    def close(self) -> None:
        pass
