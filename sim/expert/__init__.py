"""Scripted experts that read the simulator's privileged state. May import `mllm` and the rest of `sim`."""

from __future__ import annotations

import mujoco
import numpy as np

from sim.env import LiberoEnv
from sim.errors import ConfigurationError
from sim.expert.expert import Expert
from sim.expert.geometry import geoms_of
from sim.expert.hand import Hand
from sim.expert.handle import HandleExpert
from sim.expert.pick_place import PickPlaceExpert
from sim.expert.sequence import SequenceExpert
from sim.expert.shut import ShutExpert

# What comes first where a task has several goals: a drawer is opened before something goes in, and closed after it.
_ORDER = {"open": 0, "turnon": 0, "on": 1, "in": 1, "close": 2}
# Values of a joint as parts of its range: where to move it, and from where on it need not be moved. LIBERO calls a
# drawer open from 0.875 of its travel and a stove on from 0.24 of its turn.
OPEN, OPEN_ENOUGH = 0.94, 0.88
# A drawer that something goes into is opened no farther than it must, since it covers what lies before it.
AJAR, AJAR_ENOUGH = 0.84, 0.76
ON, ON_ENOUGH = 0.4, 0.25
ASIDE = 0.75  # of a region's half size, where the outermost of several objects go that share it


def make_expert(env: LiberoEnv) -> Expert:
    """The expert for the task of `env`, chosen by its goal.

    Raises ConfigurationError: the goal has a predicate that no expert can reach.
    """
    world = env.privileged()
    for goal in world.goal:
        if goal[0] not in _ORDER:
            raise ConfigurationError(
                f"{env.task.suite} task {env.task.index} ({env.task.language!r}) asks for {goal}: "
                f"the experts can do {', '.join(_ORDER)}"
            )
    hand = Hand(env, Expert.action_spec)
    goals = [_steps(env, hand, goal) for goal in sorted(world.goal, key=lambda goal: _ORDER[goal[0]])]
    return goals[0][0] if len(goals) == len(goals[0]) == 1 else SequenceExpert(env, goals, hand)


def _steps(env: LiberoEnv, hand: Hand, goal: tuple[str, ...]) -> list[Expert]:
    """What to do for one goal, in order."""
    predicate, item, *rest = goal
    if predicate == "open":
        return [_opening(env, hand, item, OPEN, OPEN_ENOUGH)]
    if predicate == "close":
        return [_closing(env, hand, item)]
    if predicate == "turnon":
        joint = _joint_of_fixture(env, hand, item)
        end = _far_end(hand, joint)
        return [HandleExpert(env, joint, ON * end, ON_ENOUGH * end, hand)]
    target = rest[0]
    moves = _joint_of_region(hand, target) is not None
    opening = [_opening(env, hand, target, AJAR, AJAR_ENOUGH)] if moves else []
    lift = not env.task.language.startswith("push")
    sharers = [other for kind, other, *where in env.privileged().goal if kind == "on" and where == [target]]
    beside = ASIDE * np.linspace(-1.0, 1.0, len(sharers))[sharers.index(item)] if len(sharers) > 1 else 0.0
    return [*opening, PickPlaceExpert(env, item, target, predicate == "in", lift, beside, hand)]


def _opening(env: LiberoEnv, hand: Hand, region: str, wide: float, enough: float) -> HandleExpert:
    joint = _joint_of_region(hand, region)
    if joint is None:
        raise ConfigurationError(f"{region!r} cannot be opened: it does not move")
    end = _far_end(hand, joint)
    return HandleExpert(env, joint, wide * end, enough * end, hand)


def _closing(env: LiberoEnv, hand: Hand, region: str) -> ShutExpert:
    joint = _joint_of_region(hand, region)
    if joint is None or hand.model.jnt_type[joint] != mujoco.mjtJoint.mjJNT_SLIDE:
        raise ConfigurationError(f"{region!r} cannot be closed: the expert closes drawers")
    return ShutExpert(env, joint, hand)


def _joint_of_region(hand: Hand, region: str) -> int | None:
    """Number of the joint that moves the part of a fixture on which a region is; None where it does not move."""
    model = hand.model
    body = next((int(model.site(site).bodyid[0]) for site in range(model.nsite) if model.site(site).name == region), 0)
    moves = model.body_jntnum[body] and model.body_parentid[body]
    return int(model.body_jntadr[body]) if moves else None


def _joint_of_fixture(env: LiberoEnv, hand: Hand, fixture: str) -> int:
    """Number of the only joint of a fixture. Raises ConfigurationError: it has none, or several."""
    model = hand.model
    below = geoms_of(model, env.privileged().body_ids[fixture])
    joints = {int(model.body_jntadr[body]) for body in model.geom_bodyid[below] if model.body_jntnum[body]}
    if len(joints) != 1:
        raise ConfigurationError(f"{fixture!r} has {len(joints)} joints: the expert turns a fixture's only one")
    return joints.pop()


def _far_end(hand: Hand, joint: int) -> float:
    """The end of the joint's range that is farther from 0, m or rad."""
    return float(max(hand.model.jnt_range[joint], key=abs))


__all__ = ["Expert", "HandleExpert", "PickPlaceExpert", "SequenceExpert", "ShutExpert", "make_expert"]
