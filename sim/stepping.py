"""How one control step is simulated: 25 substeps of 2 ms under robosuite's operational-space controller."""

from __future__ import annotations

import numpy as np

from sim.errors import ConfigurationError
from sim.world import World


class OfficialStepper:
    """robosuite's own `step`."""

    name = "official"

    def __init__(self, world: World) -> None:
        self._world = world

    def step(self, action: np.ndarray) -> bool:
        """action: (7,) float64.  Returns whether the goal holds after the step."""
        _, _, done, _ = self._world.domain.step(action)
        return bool(done)


STEPPERS = {"official": OfficialStepper}


def check_stepper(name: str) -> None:
    """Raises ConfigurationError unless `name` is a stepper."""
    if name not in STEPPERS:
        raise ConfigurationError(f"no stepper is called {name!r}; choose one of: {', '.join(STEPPERS)}")
