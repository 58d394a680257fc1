"""Labelled episodes in the real simulator: the expert's answers, whoever acts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mllm.demonstrations import axis_angle, read_demonstration
from mllm.errors import PolicyError
from mllm.policy import ActionSpec, HoldPolicy
from sim.collect import CollectConfig, Collector
from sim.dagger import MixedPolicy, PolicyMix
from sim.dataset import SuiteFolder
from sim.demonstrate import LOST_LIMIT, demonstrate, object_words, places_in_images
from sim.env import LiberoEnv
from sim.errors import ConfigurationError
from sim.executor import Noise, NoisyExpert
from sim.expert import make_expert
from sim.tasks import suite_tasks

CONFIG = CollectConfig(suite="libero_spatial", tasks=(0,), image_size=32, noise=Noise(clean=0.0), images="webp")
SEED = 5


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    made = LiberoEnv(CONFIG.env(0))
    yield made
    made.close()


@pytest.fixture(scope="module")
def noisy(env):
    return demonstrate(env, NoisyExpert(CONFIG.noise), SEED)


class Script:
    """Does what a function of the step says."""

    source, keeps_failures = "script", False

    def __init__(self, action):
        self.action = action

    def reset(self, instruction, rng):
        pass

    def executed(self, expert, observation, step):
        return self.action(expert, step)


def test_a_disturbed_episode_succeeds_and_its_labels_are_not_what_was_done(noisy):
    assert noisy.success
    disturbed = (noisy.actions != noisy.executed).any(1)
    assert 0.1 < disturbed.mean() < 0.95
    assert noisy.source == "expert"
    assert noisy.valid.all()


def test_executing_what_was_done_repeats_every_state_and_image(env, noisy):
    again = demonstrate(env, Script(lambda expert, step: noisy.executed[step]), SEED)
    np.testing.assert_array_equal(again.states, noisy.states)
    np.testing.assert_array_equal(again.actions, noisy.actions)
    for camera, images in noisy.images.items():
        np.testing.assert_array_equal(again.images[camera], images)


def test_targets_are_where_the_hand_goes_first_and_where_the_bowl_ends_up(env, noisy):
    hand = noisy.proprio["eef_pos"]
    grasps, goals = hand + noisy.targets[:, :3], hand + noisy.targets[:, 3:]
    closing = noisy.phases == noisy.phase_names.index("close")
    assert np.linalg.norm(noisy.targets[closing, :3], axis=1).min() < 0.012
    np.testing.assert_allclose(goals, np.broadcast_to(goals[0], goals.shape), atol=0.005)
    body = env.privileged().body_ids["plate_1"]
    np.testing.assert_allclose(goals[-1], env.privileged().data.xpos[body], atol=0.005)
    assert np.linalg.norm(grasps[0] - grasps[-1]) > 0.05


def test_orientations_are_robosuites_axis_angles(noisy):
    from robosuite.utils.transform_utils import quat2axisangle

    expected = [quat2axisangle(quaternion.copy()) for quaternion in noisy.proprio["eef_quat"]]
    np.testing.assert_allclose(axis_angle(noisy.proprio["eef_quat"]), expected, atol=1e-12)


def test_a_policy_acts_and_the_expert_labels_every_state_that_it_reaches(env, monkeypatch):
    monkeypatch.setattr(env, "step_limit", 12)
    held = demonstrate(env, MixedPolicy(PolicyMix("hold", beta=0.0)), SEED)
    assert (held.outcome, held.source, len(held.actions)) == ("failure", "dagger", 12)
    np.testing.assert_array_equal(held.executed, np.tile([0, 0, 0, 0, 0, 0, -1.0], (12, 1)))
    assert np.abs(held.actions[:, :3]).max(1).min() > 0.1
    env.reset(seed=SEED, options={"init_state": "sampled"})
    expert = make_expert(env)
    expert.reset("")
    np.testing.assert_array_equal(held.actions[0], expert.act(None).action.astype(np.float64))


def test_in_mixed_episodes_the_expert_takes_over_for_stretches(env, monkeypatch):
    monkeypatch.setattr(env, "step_limit", 40)
    mixed = demonstrate(env, MixedPolicy(PolicyMix("hold", beta=1.0, stretch=(3, 6))), SEED)
    helped = (mixed.executed == mixed.actions).all(1)
    assert 0.1 < helped.mean() < 0.9
    np.testing.assert_array_equal(mixed.executed[~helped][0], [0, 0, 0, 0, 0, 0, -1.0])
    changes = np.flatnonzero(np.diff(helped)) + 1
    assert np.diff([0, *changes]).min() >= 3


def test_an_episode_ends_when_the_expert_has_been_lost_for_long(env):
    world = env.privileged()
    joint = world.model.body(world.body_ids["akita_black_bowl_1"]).jntadr[0]
    address = world.model.jnt_qposadr[joint]

    def throw(expert, step):
        if step == 3:
            world.data.qpos[address : address + 7] = [0.0, 0.0, 0.05, 0.0, 1.0, 0.0, 0.0]  # under the table
            world.data.qvel[:] = 0.0
        return np.array([0, 0, 0, 0, 0, 0, -1.0])

    thrown = demonstrate(env, Script(throw), SEED)
    assert thrown.outcome == "failure"
    assert not thrown.valid[-LOST_LIMIT:].any()
    assert thrown.valid[:4].all()
    assert len(thrown.actions) < env.step_limit


def test_a_fault_in_an_episode_is_an_error_with_its_traceback_and_the_next_one_goes_well(tmp_path):
    folder = SuiteFolder(tmp_path, CONFIG.suite)
    folder.begin(CONFIG.settings(), CONFIG.tasks)
    collector = Collector(CONFIG, tmp_path)

    def fail(expert, step):
        raise ZeroDivisionError("a bug in the policy")

    noise, collector._executor = collector._executor, Script(fail)
    try:
        broken = collector((0, SEED))
        collector._executor = noise
        fine = collector((0, SEED))
    finally:
        collector.close()
    assert (broken.outcome, broken.kept) == ("error", False)
    assert "a bug in the policy" in broken.error
    assert (fine.outcome, fine.kept) == ("success", True)
    assert read_demonstration(folder.episode(0, SEED)).seed == SEED


def test_a_policy_that_cannot_be_made_or_means_something_else_is_refused(monkeypatch):
    with pytest.raises(PolicyError, match="no policy is called 'nobody'"):
        Collector(CollectConfig(policy=PolicyMix("nobody")), Path("unused"))
    monkeypatch.setattr(HoldPolicy, "action_spec", ActionSpec(translation_scale=1.0))
    with pytest.raises(ConfigurationError, match="convert them in the policy"):
        MixedPolicy(PolicyMix("hold"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": (0, 0)}, "twice"),
        ({"tasks": (99,)}, "no task 99"),
        ({"episodes": 0}, "episodes is 0"),
        ({"turn": 0}, "turn is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"images": "png"}, "'png'"),
        ({"renderer": "slow"}, "'slow'"),
        ({"suite": "libero"}, "'libero'"),
    ],
)
def test_a_setting_that_cannot_be_is_named(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        CollectConfig(**changes)


@pytest.mark.parametrize(("beta", "stretch"), [(1.5, (5, 25)), (0.5, (0, 4)), (0.5, (6, 5))])
def test_a_mix_that_cannot_be_is_refused(beta, stretch):
    with pytest.raises(ConfigurationError, match="PolicyMix"):
        PolicyMix("hold", beta=beta, stretch=stretch)


def test_no_tasks_means_all():
    assert CollectConfig(suite="libero_goal").tasks == tuple(range(len(suite_tasks("libero_goal"))))


def test_objects_are_where_the_images_show_them(env):
    before, _ = env.reset(seed=SEED, options={"init_state": "sampled"})
    privileged = env.privileged()
    words = object_words(privileged)
    assert {"plate", "cookies", "glazed rim porcelain ramekin"} == set(words)  # there are two bowls
    number = privileged.model.camera("agentview").id
    places = {name: places_in_images(privileged, [number], body)[0] for name, body in words.items()}
    after = env.move_object("plate_1", np.array([0, 0, -5.0]))
    changed = np.abs(after["images"]["agentview"].astype(int) - before["images"]["agentview"]).sum(-1)
    row, column = np.argwhere(changed > 60).mean(0) / len(changed)
    np.testing.assert_allclose(places["plate"], [row, column], atol=0.06)
    assert min(np.linalg.norm(places["plate"] - place) for name, place in places.items() if name != "plate") > 0.1
