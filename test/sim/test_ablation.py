"""What is taken from a policy is gone, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from mllm.policy import Observation
from sim.ablation import Blind, Misled, other_task
from sim.errors import ConfigurationError
from sim.tasks import item_of, possible, suite_tasks

CAMERAS = ("agentview", "robot0_eye_in_hand")
RANDOM = {"seed": 0}


def noise(seed: int) -> Observation:
    generator = np.random.default_rng(seed)
    return Observation({name: generator.integers(0, 256, (128, 128, 3), np.uint8) for name in CAMERAS})


def answers(policy, instruction: str) -> list[np.ndarray]:
    policy.reset(instruction)
    return [policy.act(noise(seed)).action for seed in range(3)]


def test_a_blind_policy_s_answer_does_not_depend_on_the_images():
    words = suite_tasks("libero_spatial")[0].language
    blind = answers(Blind("mini", RANDOM), words)
    assert all(np.array_equal(blind[0], other) for other in blind[1:])
    misled = answers(Misled("mini", RANDOM), words)
    assert any(not np.array_equal(misled[0], other) for other in misled[1:])


def test_a_misled_policy_hears_about_the_scene_s_other_bowl():
    tasks = suite_tasks("libero_spatial")
    misled = answers(Misled("mini", RANDOM), tasks[3].language)
    plain = Misled("mini", RANDOM)
    plain.told = lambda instruction: instruction  # type: ignore[method-assign]
    assert all(map(np.array_equal, misled, answers(plain, tasks[9].language)))
    with pytest.raises(ConfigurationError, match="no task of LIBERO"):
        Misled("mini", RANDOM).reset("fly to the moon")


def test_the_other_object_lies_in_the_same_scene():
    for task in suite_tasks("libero_object") + suite_tasks("libero_spatial"):
        told = replace(task, language=other_task(task).language)
        assert item_of(told) != item_of(task)
        assert item_of(told) in task.bddl_file.read_text()


def test_the_other_bowl_of_a_scene_lies_where_its_own_task_says():
    tasks = suite_tasks("libero_spatial")
    ways = {task.index: other_task(task).language for task in tasks}
    assert ways[0] == tasks[1].language  # between plate and ramekin; the other is next to the ramekin
    assert ways[4] == tasks[9].language  # in the drawer; the other is on the cabinet
    assert all([other.index for other in possible(task)].count(task.index) == 1 for task in tasks)
    assert all(len(possible(task)) == 2 for task in tasks)


def test_a_policy_that_answers_one_episode_at_a_time_is_refused():
    with pytest.raises(ConfigurationError, match="'hold' has no begin"):
        Blind("hold")
