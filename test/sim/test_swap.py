"""Which object a policy goes to is read from the simulator: shown with the expert, which goes where it is sent."""

from __future__ import annotations

import numpy as np
import pytest

from mllm.policy import ActionSpec, ActionStep, HoldPolicy
from sim.env import EnvConfig, LiberoEnv
from sim.expert import PickPlaceExpert
from sim.swap import Swap, what_moved


@pytest.fixture(scope="module")
def env():
    made = LiberoEnv(EnvConfig("libero_object", 6, cameras=()))
    yield made
    made.close()


class Sent:
    """Carries `item`, whatever it is told."""

    action_spec = ActionSpec()

    def __init__(self, env: LiberoEnv, item: str) -> None:
        self._expert = PickPlaceExpert(env, item, "basket_1_contain_region", container=True)

    def reset(self, instruction: str) -> None:
        self._expert.reset(instruction)

    def act(self, observation) -> ActionStep:
        return self._expert.act(observation)


@pytest.mark.parametrize("item", ["butter_1", "chocolate_pudding_1"])
def test_the_object_that_is_moved_is_the_one_it_went_to(env, item):
    assert what_moved(env, Sent(env, item), "", 0) == (item,)


def test_what_slides_without_going_up_counts_too(env):
    class Slides(HoldPolicy):
        def act(self, observation) -> ActionStep:
            env.move_object("butter_1", np.array([0.02, 0, 0]))
            return super().act(observation)

    assert what_moved(env, Slides(), "", 0) == ("butter_1",)


def test_a_policy_that_holds_still_moves_nothing(env):
    env.step_limit = 5
    try:
        assert what_moved(env, HoldPolicy(), "", 0) == ()
    finally:
        env.step_limit = 280


def test_where_it_went_is_named_by_the_first_object():
    assert Swap(0, 0, "a", "b", ("a", "b")).went == "told"
    assert Swap(0, 0, "a", "b", ("b",)).went == "usual"
    assert Swap(0, 0, "a", "b", ("c",)).went == "another"
    assert Swap(0, 0, "a", "b", ()).went == "none"
