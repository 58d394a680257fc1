"""The scripted expert in LIBERO's own scenes, without rendering."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from mllm.policy import Observation, Policy
from sim.env import EnvConfig, LiberoEnv
from sim.errors import ConfigurationError
from sim.expert import Expert, HandleExpert, PickPlaceExpert, SequenceExpert, make_expert
from sim.expert.geometry import rotation_about
from sim.expert.hand import Hand
from sim.rollout import rollout

BLIND = Observation(images={})


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    """A scene with a stove, a cabinet, a bowl and a plate."""
    made = LiberoEnv(EnvConfig(suite="libero_goal", task="turn on the stove", cameras=()))
    yield made
    made.close()


def solves(env: LiberoEnv, expert: Expert, init_state: int = 0) -> bool:
    episode = rollout(env, expert, init_state=init_state)
    assert episode.error is None
    return episode.outcome == "success"


@pytest.mark.parametrize(
    ("suite", "task", "kind"),
    [
        ("libero_spatial", 4, PickPlaceExpert),
        ("libero_object", 6, PickPlaceExpert),
        ("libero_goal", 2, PickPlaceExpert),
        ("libero_goal", 3, SequenceExpert),
        ("libero_goal", 5, PickPlaceExpert),
        ("libero_10", 1, SequenceExpert),
    ],
    ids=[
        "bowl in a drawer",
        "flat box into a basket",
        "bottle onto a cabinet",
        "open a drawer and put a bowl inside",
        "push a plate",
        "two things into a basket",
    ],
)
def test_the_expert_solves(suite: str, task: int, kind: type[Expert]) -> None:
    env = LiberoEnv(EnvConfig(suite=suite, task=task, cameras=()))
    try:
        expert = make_expert(env)
        assert isinstance(expert, kind)
        assert solves(env, expert)
    finally:
        env.close()


def test_the_expert_puts_a_bowl_into_a_drawer_and_shuts_it() -> None:
    env = LiberoEnv(EnvConfig(suite="libero_10", task=3, cameras=()))
    try:
        assert solves(env, make_expert(env), init_state=1)
    finally:
        env.close()


def test_the_expert_turns_a_knob(env: LiberoEnv) -> None:
    expert = make_expert(env)
    assert isinstance(expert, HandleExpert)
    assert solves(env, expert)


def test_a_predicate_that_no_expert_reaches_is_refused(env: LiberoEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(env.privileged(), goal=(("turnoff", "flat_stove_1"),))
    monkeypatch.setattr(env, "privileged", lambda: asked)
    with pytest.raises(ConfigurationError, match="turnoff"):
        make_expert(env)


def test_fixtures_and_unknown_names_cannot_be_carried(env: LiberoEnv) -> None:
    with pytest.raises(ConfigurationError, match="fixed to the scene"):
        PickPlaceExpert(env, "wooden_cabinet_1", "plate_1")
    with pytest.raises(ConfigurationError, match="objects are"):
        PickPlaceExpert(env, "akita_black_bowl_1", "moon")


def test_a_hand_that_would_turn_far_grips_the_other_way_round(env: LiberoEnv) -> None:
    env.reset()
    hand = Hand(env, Expert.action_spec)
    hand.look()
    forward = hand.axes[:, 2]
    for angle, turned in ((1.0, 1.0), (2.5, 2.5 - np.pi)):
        turn = hand.turn_to(rotation_about(forward, angle) @ hand.axes)
        np.testing.assert_allclose(turn, turned * forward, atol=1e-6)


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


def test_a_door_is_not_a_drawer() -> None:
    env = LiberoEnv(EnvConfig(suite="libero_10", task=9, cameras=()))
    try:
        with pytest.raises(ConfigurationError, match="'microwave_1' cannot be closed: the expert closes drawers"):
            make_expert(env)
    finally:
        env.close()
