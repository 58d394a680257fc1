"""A real object moves in real pixels in the step in which a policy reuses an action."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from mllm.policy import ActionSpec, ActionStep, Observation
from mllm.reuse import ReuseConfig
from mllm.reuse_policy import with_reuse
from sim.env import EnvConfig, LiberoEnv
from sim.errors import ConfigurationError
from sim.push import Push, find_push, free_shift, pushed, target

STEPS = 9


class Drifting:
    """Goes on in one direction, slowly, and looks at every frame."""

    action_spec = ActionSpec()

    def reset(self, instruction: str) -> None:
        pass

    def act(self, observation: Observation) -> ActionStep:
        return ActionStep(np.array([0.1, 0, 0, 0, 0, 0, -1], np.float32))


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    made = LiberoEnv(EnvConfig("libero_object", 0, ("agentview",), 128, "fast", step_limit=STEPS))
    yield made
    made.close()


def test_the_gate_answers_the_first_frame_that_shows_the_push_and_the_paper_s_rule_does_not(env):
    policy = with_reuse(Drifting(), ReuseConfig("paper"))
    push = Push(0.05, near=1.0)
    found = find_push(env, policy, 0, push)
    assert found is not None
    step, shift = found
    assert (step, np.linalg.norm(shift)) == (2, pytest.approx(0.05))
    delays, shares = {}, {}
    for rule in ("off", "paper", "gated"):
        policy.configure(reuse=rule)
        episode = pushed(env, policy, 0, rule, push, step, shift)
        assert (episode.step, episode.steps, episode.success) == (2, STEPS, False)
        delays[rule], shares[rule] = episode.delay, episode.reused
    assert delays == {"off": 0, "paper": 1, "gated": 0}
    assert shares == {"off": 0, "paper": pytest.approx(3 / 9), "gated": pytest.approx(2 / 9)}


def test_without_a_reuse_near_the_object_there_is_nothing_to_disturb(env):
    assert find_push(env, with_reuse(Drifting(), ReuseConfig("paper")), 0, Push(near=0.001)) is None
    assert find_push(env, with_reuse(Drifting(), ReuseConfig()), 0, Push(near=1.0)) is None


def test_an_object_is_where_it_was_moved_to_and_the_next_frame_shows_it(env):
    observation, _ = env.reset()
    name, world = target(env), env.privileged()
    place, image = world.data.xpos[world.body_ids[name]].copy(), observation["images"]["agentview"]
    moved = env.move_object(name, np.array([0.03, 0.04, 0]))
    np.testing.assert_allclose(world.data.xpos[world.body_ids[name]] - place, [0.03, 0.04, 0], atol=1e-12)
    assert np.abs(moved["images"]["agentview"].astype(int) - image).max() > 50
    assert env.observation_for_policy(moved).images["agentview"] is moved["images"]["agentview"]
    with pytest.raises(ConfigurationError, match="no movable object is called 'basket'; choose one of: "):
        env.move_object("basket", np.zeros(3))


def test_a_free_shift_touches_nothing_and_looking_for_one_changes_nothing(env):
    env.reset()
    before = env.state()
    name, world = target(env), env.privileged()
    shifts = [free_shift(env, name, 0.05, np.random.default_rng(seed)) for seed in range(4)]
    assert np.array_equal(env.state(), before)
    for shift in shifts:
        assert shift is not None
        assert shift[2] == 0
    assert free_shift(env, name, 0.05, np.random.default_rng(0)).tolist() == shifts[0].tolist()
    # A neighbour stands where the object would go: another direction is taken.
    shift = free_shift(env, name, 0.12, np.random.default_rng(0))
    place, other = (world.data.xpos[world.body_ids[known]] for known in (name, "milk_1"))
    env.move_object("milk_1", place + shift - other)
    again = free_shift(env, name, 0.12, np.random.default_rng(0))
    assert again is not None
    assert not np.allclose(again, shift)


@pytest.mark.parametrize(("wrong", "message"), [({"distance": 0}, "distance is 0"), ({"over": 0}, "over is 0")])
def test_a_push_that_is_none_is_refused(wrong, message):
    with pytest.raises(ConfigurationError, match=message):
        Push(**wrong)
