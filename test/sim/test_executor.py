"""Disturbances of the expert: reproducible, within limits, and only of the kinds that are asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mllm.policy import Observation
from sim.executor import Noise, NoisyExpert

QUIET = Noise(clean=0.0, kicked=0.0, burst_rate=0.0, slip_rate=0.0)
LABEL = np.array([0.1, -0.2, 0.3, 0.0, 0.0, 0.1, 1.0])


def play(noise: Noise, seed: int, steps: int = 300, label: np.ndarray = LABEL) -> np.ndarray:
    executor = NoisyExpert(noise)
    executor.reset("anything", np.random.default_rng(seed))
    return np.array([executor.executed(label, Observation({}), step) for step in range(steps)])


def test_the_same_seed_gives_the_same_disturbance():
    np.testing.assert_array_equal(play(Noise(clean=0.0), 3), play(Noise(clean=0.0), 3))
    assert not np.array_equal(play(Noise(clean=0.0), 3), play(Noise(clean=0.0), 4))


def test_a_clean_episode_executes_the_expert():
    np.testing.assert_array_equal(play(Noise(clean=1.0), 0), np.tile(LABEL, (300, 1)))


def test_the_share_of_clean_episodes_is_as_asked_for():
    clean = [
        np.array_equal(play(Noise(clean=0.25, kicked=1.0), seed, 20), np.tile(LABEL, (20, 1))) for seed in range(400)
    ]
    assert 0.18 < np.mean(clean) < 0.32


def test_executed_actions_stay_within_their_limits():
    wild = Noise(clean=0.0, translation=3.0, rotation=3.0, turning=1.0)
    assert max(np.abs(play(wild, seed)).max() for seed in range(20)) <= 1.0


def test_a_kick_moves_one_way_with_an_open_gripper_and_then_ends():
    kicked = Noise(clean=0.0, kicked=1.0, burst_rate=0.0, slip_rate=0.0)
    actions = play(kicked, 5)
    length = int(np.argmax((actions == LABEL).all(1)))
    assert 2 <= length <= 8
    assert (actions[:length] == actions[0]).all()
    assert actions[0, 6] == -1.0
    np.testing.assert_array_equal(actions[length:], np.tile(LABEL, (300 - length, 1)))


@pytest.mark.parametrize(("turning", "columns"), [(0.0, 3), (1.0, 6)])
def test_bursts_disturb_translation_and_rotation_only_where_asked(turning, columns):
    actions = play(replace(QUIET, burst_rate=0.06, turning=turning), 1)
    disturbed = (actions != LABEL).any(0)
    assert disturbed.tolist() == [True] * columns + [False] * (7 - columns)
    assert 0.1 < (actions != LABEL).any(1).mean() < 0.9


def test_slips_open_a_gripper_that_should_be_closed_and_leave_an_open_one():
    slipping = replace(QUIET, slip_rate=0.05)
    closed = play(slipping, 2)
    assert 0.02 < (closed[:, 6] == -1.0).mean() < 0.5
    np.testing.assert_array_equal(closed[:, :6], np.tile(LABEL[:6], (300, 1)))
    opened = np.array([*LABEL[:6], -1.0])
    np.testing.assert_array_equal(play(slipping, 2, label=opened), np.tile(opened, (300, 1)))
