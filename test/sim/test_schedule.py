"""Which episodes, and in what order."""

from __future__ import annotations

import pytest

from sim.errors import ConfigurationError
from sim.schedule import episode_keys, make_blocks, parse_numbers, parse_tasks


def test_numbers_are_ranges_and_single_ones() -> None:
    assert parse_numbers("20-22,7", "--states") == (20, 21, 22, 7)


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-3", "1-", "1-3,2"])
def test_other_numbers_are_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--states"):
        parse_numbers(text, "--states")


def test_tasks_are_all_numbers_or_an_instruction() -> None:
    assert parse_tasks("libero_goal", "all") == tuple(range(10))
    assert parse_tasks("libero_goal", "7-9") == (7, 8, 9)
    assert parse_tasks("libero_goal", "turn on the stove") == (7,)
    with pytest.raises(ConfigurationError, match="no task 10"):
        parse_tasks("libero_goal", "9-10")


def test_a_state_that_a_task_lacks_is_refused_before_anything_is_played() -> None:
    with pytest.raises(ConfigurationError, match="no initial state 50; choose 0 to 49"):
        episode_keys("libero_goal", (0,), range(45, 51))


def test_sampled_episodes_have_seeds_of_their_own() -> None:
    keys = episode_keys("libero_goal", (0,), (100, 101), draw="sampled")
    assert [(key.init_state, key.seed) for key in keys] == [("sampled", 100), ("sampled", 101)]


def test_a_stopped_run_has_about_as_many_episodes_of_each_task() -> None:
    keys = episode_keys("libero_goal", (0, 1, 2), range(10))
    blocks = make_blocks(keys, in_a_row=4, workers=2)
    assert [(block[0].task, len(block)) for block in blocks] == [
        (0, 4), (1, 4), (2, 4), (0, 4), (1, 4), (2, 4), (0, 2), (1, 2), (2, 2)
    ]  # fmt: skip
    assert sorted(map(str, keys)) == sorted(str(key) for block in blocks for key in block)


def test_every_worker_gets_something_to_do() -> None:
    blocks = make_blocks(episode_keys("libero_goal", (0,), range(8)), in_a_row=5, workers=4)
    assert [len(block) for block in blocks] == [2, 2, 2, 2]
