"""Several goals, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sim.env import LiberoEnv
from sim.expert.expert import Expert
from sim.expert.hand import Hand


class SequenceExpert(Expert):
    """Works on the first goal that is not reached, as the state says.

    goals: for each, the experts that reach it, in order. The last one's `done` says that it is reached; those before it
    only prepare for that. What the hand already has goes first.
    current: the expert that gave the last action; it plans when its turn comes.
    """

    def __init__(self, env: LiberoEnv, goals: Sequence[Sequence[Expert]], hand: Hand) -> None:
        super().__init__(env, hand)
        self._goals = goals
        self.current = goals[0][0]

    def prepare(self) -> None:
        self.current = self._choose()
        self.current.prepare()

    def decide(self) -> np.ndarray:
        chosen = self._choose()
        if chosen is not self.current:
            self.current = chosen
            chosen.prepare()
        action = chosen.decide()
        self.phase = chosen.phase
        return action

    def done(self) -> bool:
        return all(steps[-1].done() for steps in self._goals)

    def holding(self) -> bool:
        return self.current.holding()

    @property
    def targets(self) -> np.ndarray:
        return self.current.targets

    def _choose(self) -> Expert:
        waiting = [steps for steps in self._goals if not steps[-1].done()]
        for steps in waiting:
            if steps[-1].holding() and all(step.done() for step in steps[:-1]):
                return steps[-1]
        for step in waiting[0] if waiting else []:
            if not step.done():
                return step
        return self.current
