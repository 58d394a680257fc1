"""Suites, tasks and initial states."""

import subprocess
import sys

import numpy as np
import pytest

from sim.errors import ConfigurationError
from sim.tasks import (
    SHUFFLED_SUITES,
    STEP_LIMITS,
    SUITES,
    asked,
    find_task,
    load_init_states,
    possible,
    suite_tasks,
)
from sim.versions import PUBLISHED_MUJOCO, package_versions, warn_about_mujoco


def test_the_suites_have_130_tasks_and_openvla_s_step_limits() -> None:
    assert [len(suite_tasks(suite)) for suite in SUITES] == [10, 10, 10, 10, 90]
    assert [STEP_LIMITS[suite] for suite in SUITES] == [220, 280, 300, 520, 400]


@pytest.mark.parametrize("suite", SHUFFLED_SUITES)
def test_two_seeds_of_shuffled_starts_ask_for_many_things(suite: str) -> None:
    tasks = suite_tasks(suite)
    assert len({asked(task, "shuffled", seed).language for task in tasks for seed in (20, 21)}) >= 5
    for seed in range(20, 24):
        told = [[other.language for other in possible(task)] for task in tasks]
        words = [asked(task, "shuffled", seed).language for task in tasks]
        places = {options.index(word) for options, word in zip(told, words, strict=True)}
        assert len(places) > 1
        assert asked(tasks[0], "sampled", seed) == tasks[0]


@pytest.mark.parametrize("suite", SUITES)
def test_every_task_has_50_finite_initial_states(suite: str) -> None:
    for task in suite_tasks(suite):
        states = load_init_states(task)
        assert states.shape[0] == 50
        assert states.dtype == np.float64
        assert task.bddl_file.is_file()


def test_a_task_is_found_by_index_instruction_and_name() -> None:
    task = find_task("libero_goal", 7)
    assert find_task("libero_goal", " Turn on the STOVE ") == task == find_task("libero_goal", task.name)


@pytest.mark.parametrize(
    ("suite", "task", "complaint"),
    [
        ("libero_mine", 0, "libero_spatial, libero_object"),
        ("libero_goal", 10, "choose 0 to 9"),
        ("libero_goal", -1, "choose 0 to 9"),
        ("libero_goal", "make tea", "turn on the stove"),
        ("libero_goal", 1.5, "index or an instruction"),
        ("libero_90", "put the black bowl on the plate", r"9 \(KITCHEN_SCENE1"),
    ],
)
def test_a_wrong_task_is_refused_with_the_valid_ones(suite: str, task: object, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        find_task(suite, task)  # type: ignore[arg-type]


def test_names_and_rollouts_import_no_simulator_no_torch_and_no_ros() -> None:
    code = (
        "import sys, sim, sim.tasks, sim.rollout, sim.env\n"
        "sim.tasks.find_task('libero_goal', 0)\n"
        "print([name for name in ('robosuite', 'mujoco', 'torch', 'rclpy') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_another_mujoco_than_the_published_one_is_warned_about() -> None:
    with pytest.warns(UserWarning, match=f"mujoco==?{PUBLISHED_MUJOCO}"):
        warn_about_mujoco("3.17.0")


def test_versions_name_everything_that_pixels_depend_on() -> None:
    assert {"mujoco", "robosuite", "libero", "numpy", "python"} <= package_versions().keys()
