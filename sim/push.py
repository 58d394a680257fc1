"""Somebody moves the object that a policy is about to grasp, while it reuses an action: does it notice, and when?

The step is found in an undisturbed episode under FlashVLA's own rule: the first that is reused near the object. Then
the same episode is played under each rule, and in that step the object is somewhere else. Up to then the paper's rule
does what it did before, so that with it the push falls into a reuse for certain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mllm.policy import ActionStep, Policy, Tunable, make_policy
from mllm.reuse import Reason, ReuseConfig
from sim.env import EnvConfig, LiberoEnv
from sim.errors import ConfigurationError

DIRECTIONS = 8  # that are tried, one after the other


@dataclass(frozen=True)
class Push:
    """distance: m, along the table.  over: control steps that it takes; 1 is a jump.

    near: m from the hand to the object, within which the policy is disturbed.
    """

    distance: float = 0.04
    over: int = 1
    near: float = 0.25

    def __post_init__(self) -> None:
        for name in ("distance", "near"):
            if not (np.isfinite(value := getattr(self, name)) and 0 < value <= 1):
                raise ConfigurationError(f"Push.{name} is {value!r}: it must be above 0 m and at most 1 m")
        if not 1 <= self.over <= 100:
            raise ConfigurationError(f"Push.over is {self.over!r}: it must be from 1 to 100 steps")


@dataclass(frozen=True)
class Pushed:
    """One episode. rule: of reuse.  step: at whose observation the object has begun to move.

    delay: steps from there to the first action that the model computed from what it saw then; None where it never ran.
    reused: share of all steps.
    """

    suite: str
    task: int
    init_state: int
    rule: str
    step: int
    success: bool
    steps: int
    delay: int | None
    reused: float


def play_pushes(
    policy: str,
    options: dict[str, Any],
    suite: str,
    tasks: Sequence[int],
    states: Sequence[int],
    rules: Sequence[str] = ("off", "paper", "gated"),
    push: Push | None = None,
) -> Iterator[list[Pushed]]:
    """For every initial state of every task one episode under each of `rules`; none where nothing was reused in time.

    rules: see `ReuseConfig.parse`; the step to disturb is found with the thresholds of the first that is on.
    """
    push = push or Push()
    configs = {rule: ReuseConfig.parse(rule) for rule in rules}
    on = next((config for config in configs.values() if config.mode != "off"), ReuseConfig("paper"))
    probe = replace(on, mode="paper", max_consecutive=1, computed_between=max(2, on.computed_between))
    made = make_policy(policy, **{**options, "reuse": probe})
    assert isinstance(made, Tunable)
    render = {"cameras": ("agentview", "robot0_eye_in_hand"), **(getattr(made, "render", None) or {})}
    for task in tasks:
        env = LiberoEnv(EnvConfig(suite, task, **render))
        try:
            for state in states:
                made.configure(reuse=probe)
                episodes = []
                if found := find_push(env, made, state, push):
                    for rule, config in configs.items():
                        made.configure(reuse=config)
                        episodes.append(pushed(env, made, state, rule, push, *found))
                yield episodes
        finally:
            env.close()


def play(
    env: LiberoEnv,
    policy: Policy,
    state: int,
    answered: Callable[[int, ActionStep, dict[str, Any]], bool],
    shown: Callable[[int, dict[str, Any]], dict[str, Any]] = lambda _, observation: observation,
) -> bool:
    """Plays an episode; returns whether it reached the goal.

    shown: step and observation -> what the policy sees.  answered: step, answer and observation, before the answer is
    carried out -> whether to stop there.
    """
    observation, _ = env.reset(options={"init_state": state})
    policy.reset(env.task.language)
    step, success, ended = 0, False, False
    while not ended:
        observation = shown(step, observation)
        answer = policy.act(env.observation_for_policy(observation))
        if answered(step, answer, observation):
            return False
        observation, _, success, truncated, _ = env.step(np.asarray(answer.action))
        step, ended = step + 1, success or truncated
    return success


def find_push(env: LiberoEnv, policy: Policy, state: int, push: Push) -> tuple[int, np.ndarray] | None:
    """The step to disturb and the shift, (3,) m; None where nothing is reused near the object before it is grasped."""
    name, generator = target(env), np.random.default_rng([env.task.index, state])
    found: list[tuple[int, np.ndarray]] = []

    def look(step: int, answer: ActionStep, observation: dict[str, Any]) -> bool:
        world = env.privileged()
        distance = np.linalg.norm(observation["proprio"]["eef_pos"] - world.data.xpos[world.body_ids[name]])
        if answer.flags.get("reuse_reason") == Reason.REUSED.value and distance < push.near:
            shift = free_shift(env, name, push.distance, generator)
            if shift is not None:
                found.append((step, shift))
        return bool(found) or answer.action[6] > 0

    play(env, policy, state, look)
    return found[0] if found else None


def pushed(env: LiberoEnv, policy: Policy, state: int, rule: str, push: Push, step: int, shift: np.ndarray) -> Pushed:
    """The episode in which the object is moved by `shift` from `step` on."""
    name, left = target(env), 0
    reused: list[bool] = []
    noticed: list[int] = []

    def disturb(now: int, observation: dict[str, Any]) -> dict[str, Any]:
        return env.move_object(name, shift / push.over) if step <= now < step + push.over else observation

    def note(now: int, answer: ActionStep, _: dict[str, Any]) -> bool:
        nonlocal left
        reused.append(bool(answer.flags.get("reuse")))
        if now >= step and not left and not reused[-1]:
            noticed.append(now - step)
        left = answer.left
        return False

    success = play(env, policy, state, note, disturb)
    delay = noticed[0] if noticed else None
    share = float(np.mean(reused))
    return Pushed(env.task.suite, env.task.index, state, rule, step, success, len(reused), delay, share)


def target(env: LiberoEnv) -> str:
    """The object that the task is about: the first of its goal."""
    return env.privileged().goal[0][1]


def free_shift(env: LiberoEnv, name: str, distance: float, generator: np.random.Generator) -> np.ndarray | None:
    """A shift of the object along the table, in a direction drawn by `generator` or the next one in which it touches
    nothing that it does not touch now: (3,) m, or None where there is none. The simulator stays as it was.
    """
    world = env.privileged()
    model, data = world.model, world.data
    body = world.body_ids[name]
    address = model.jnt_qposadr[model.body_jntadr[body]]
    qpos, warm = data.qpos.copy(), data.qacc_warmstart.copy()

    def touched() -> set[int]:
        bodies = [model.body_rootid[model.geom_bodyid[pair]] for pair in data.contact.geom]
        mine = model.body_rootid[body]
        return {int(other) for pair in bodies if mine in pair for other in pair}

    now, drawn, found = touched(), generator.uniform(0, 2 * np.pi), None
    for turn in np.arange(DIRECTIONS) * (2 * np.pi / DIRECTIONS):
        shift = distance * np.array([np.cos(drawn + turn), np.sin(drawn + turn), 0.0])
        data.qpos[address : address + 3] += shift
        world.domain.sim.forward()
        free = touched() <= now
        data.qpos[:] = qpos
        if free:
            found = shift
            break
    world.domain.sim.forward()
    data.qacc_warmstart[:] = warm
    return found
