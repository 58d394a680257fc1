"""Scripted experts that read the simulator's privileged state. May import `mllm` and the rest of `sim`."""

from __future__ import annotations

from sim.env import LiberoEnv
from sim.errors import ConfigurationError
from sim.expert.pick_place import PickPlaceExpert


def make_expert(env: LiberoEnv) -> PickPlaceExpert:
    """The expert for the task of `env`, chosen by its goal.

    Raises ConfigurationError: the goal is more than carrying one object to one place.
    """
    world = env.privileged()
    where = f"{env.task.suite} task {env.task.index} ({env.task.language!r})"
    if len(world.goal) != 1:
        raise ConfigurationError(f"{where} has {len(world.goal)} goals: the expert can do one, 'on' or 'in'")
    predicate, item, *rest = world.goal[0]
    if predicate not in ("on", "in") or len(rest) != 1:
        raise ConfigurationError(f"{where} asks for '{predicate}': the expert can only put an object 'on' or 'in' one")
    target = rest[0]
    if target not in world.body_ids:
        body = world.model.site(target).bodyid[0]
        if world.model.body_jntnum[body] and world.model.body_parentid[body]:
            raise ConfigurationError(
                f"{where} puts an object into a drawer or door, {target!r}: the expert cannot open it"
            )
    return PickPlaceExpert(env, item, target, container=predicate == "in")


__all__ = ["PickPlaceExpert", "make_expert"]
