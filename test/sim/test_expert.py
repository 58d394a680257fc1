"""The scripted expert in LIBERO's own scenes, without rendering."""

from collections.abc import Iterator

import numpy as np
import pytest

from mllm.policy import Observation, Policy
from sim.env import EnvConfig, LiberoEnv
from sim.errors import ConfigurationError
from sim.expert import PickPlaceExpert, make_expert
from sim.rollout import rollout

BLIND = Observation(images={})


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    """A task beyond the expert, in a scene with a bowl and a plate that it can carry the one to the other."""
    made = LiberoEnv(EnvConfig(suite="libero_goal", task="turn on the stove", cameras=()))
    yield made
    made.close()


@pytest.mark.parametrize(
    ("suite", "task"),
    [("libero_spatial", 4), ("libero_object", 6), ("libero_goal", 2)],
    ids=["bowl in a drawer", "flat box into a basket", "bottle onto a cabinet"],
)
def test_the_expert_solves(suite: str, task: int) -> None:
    env = LiberoEnv(EnvConfig(suite=suite, task=task, cameras=()))
    try:
        episode = rollout(env, make_expert(env), init_state=0)
    finally:
        env.close()
    assert episode.error is None
    assert episode.outcome == "success"


def test_a_goal_beyond_pick_and_place_is_refused(env: LiberoEnv) -> None:
    with pytest.raises(ConfigurationError, match="turnon"):
        make_expert(env)


def test_fixtures_and_unknown_names_cannot_be_carried(env: LiberoEnv) -> None:
    with pytest.raises(ConfigurationError, match="fixed to the scene"):
        PickPlaceExpert(env, "wooden_cabinet_1", "plate_1")
    with pytest.raises(ConfigurationError, match="objects are"):
        PickPlaceExpert(env, "akita_black_bowl_1", "moon")


def test_acting_needs_a_reset(env: LiberoEnv) -> None:
    expert = PickPlaceExpert(env, "akita_black_bowl_1", "plate_1")
    assert isinstance(expert, Policy)
    with pytest.raises(ConfigurationError, match="reset"):
        expert.act(BLIND)


def test_equal_states_get_equal_actions_whatever_came_before(env: LiberoEnv) -> None:
    env.reset()
    asked, silent = (PickPlaceExpert(env, "akita_black_bowl_1", "plate_1") for _ in range(2))
    asked.reset("")
    silent.reset("")
    phases = set()
    for step in range(45):
        answer = asked.act(BLIND)
        phases.add(answer.flags["phase"])
        if step % 11 == 10:
            np.testing.assert_array_equal(silent.act(BLIND).action, answer.action)
        np.testing.assert_array_equal(asked.act(BLIND).action, answer.action)
        env.step(answer.action)
    assert {"approach", "descend", "close", "carry"} <= phases


def test_watching_does_not_change_the_simulation(env: LiberoEnv) -> None:
    rng = np.random.default_rng(0)
    actions = rng.uniform(-0.5, 0.5, (10, 7)).astype(np.float32)
    finals = []
    for watched in (False, True):
        env.reset()
        expert = PickPlaceExpert(env, "akita_black_bowl_1", "plate_1")
        expert.reset("")
        for action in actions:
            if watched:
                expert.act(BLIND)
            env.step(action)
        finals.append(env.state())
    np.testing.assert_array_equal(finals[0], finals[1])


def test_an_object_put_elsewhere_is_planned_for_again(env: LiberoEnv) -> None:
    env.reset()
    expert = PickPlaceExpert(env, "akita_black_bowl_1", "plate_1")
    expert.reset("")
    world = env.privileged()
    address = world.model.jnt_qposadr[world.model.body_jntadr[world.body_ids["akita_black_bowl_1"]]]
    world.data.qpos[address + 1] -= 0.05
    fresh = PickPlaceExpert(env, "akita_black_bowl_1", "plate_1")
    fresh.reset("")
    world.data.qvel[:] = 0.0
    np.testing.assert_array_equal(expert.act(BLIND).action, fresh.act(BLIND).action)
