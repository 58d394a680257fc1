"""Where does a policy go when it is told something else? One scene, two instructions, and what it moves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mllm.policy import Policy
from sim.ablation import other_task
from sim.env import EnvConfig, LiberoEnv
from sim.tasks import item_of

MOVED = 0.05  # m from where it lay, in any direction: some bowls are carried down to the plate; our choice


@dataclass(frozen=True)
class Swap:
    """One episode. told: the object of the instruction.  usual: the one that the scene's own task is about.

    moved: names of the objects that were moved; several only where they were in the same step.
    """

    task: int
    init_state: int
    told: str
    usual: str
    moved: tuple[str, ...]

    @property
    def went(self) -> str:
        """To which object it went first: "told", "usual", "another" or "none"."""
        if not self.moved:
            return "none"
        return {self.told: "told", self.usual: "usual"}.get(self.moved[0], "another")


def play_swaps(policy: Policy, suite: str, tasks: Sequence[int], states: Sequence[int]) -> Iterator[Swap]:
    """Every initial state of every task of one of `SHUFFLED_SUITES`, told what `sim.ablation.other_task` says.

    The policy is shown what its attribute `render` asks for. An episode ends when an object has been moved, or at the
    suite's step limit.
    """
    render = {"cameras": ("agentview", "robot0_eye_in_hand"), **(getattr(policy, "render", None) or {})}
    for number in tasks:
        env = LiberoEnv(EnvConfig(suite, number, **render))
        try:
            told = replace(env.task, language=other_task(env.task).language)
            for state in states:
                moved = what_moved(env, policy, told.language, state)
                yield Swap(number, state, item_of(told), item_of(env.task), moved)
        finally:
            env.close()


def what_moved(env: LiberoEnv, policy: Policy, instruction: str, state: int) -> tuple[str, ...]:
    """Plays until an object is `MOVED` from where it lay, and returns which: several only in one step."""
    observation, _ = env.reset(options={"init_state": state})
    world = env.privileged()
    movable = world.movable
    lay = {name: world.data.xpos[body].copy() for name, body in movable.items()}
    policy.reset(instruction)
    ended = False
    while not ended:
        action = np.asarray(policy.act(env.observation_for_policy(observation)).action)
        observation, _, success, truncated, _ = env.step(action)
        moved = tuple(
            name for name, body in movable.items() if np.linalg.norm(world.data.xpos[body] - lay[name]) > MOVED
        )
        if moved:
            return moved
        ended = success or truncated
    return ()
