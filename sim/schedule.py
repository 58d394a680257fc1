"""Which episodes an evaluation plays, and in what order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sim.errors import ConfigurationError
from sim.results import EpisodeKey
from sim.tasks import check_draw, find_task, load_init_states, suite_tasks


def parse_numbers(text: str, name: str) -> tuple[int, ...]:
    """Reads "20-22,7" as (20, 21, 22, 7). Raises ConfigurationError: not of that form, or a number twice."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdigit() and (last.isdigit() if dash else True)) or (dash and int(last) < int(first)):
            raise ConfigurationError(f"{name} is {text!r}: write numbers and ranges such as 0-9,20")
        numbers += range(int(first), int(last if dash else first) + 1)
    if len(set(numbers)) != len(numbers):
        raise ConfigurationError(f"{name} is {text!r}: it names a number twice")
    return tuple(numbers)


def parse_tasks(suite: str, text: str) -> tuple[int, ...]:
    """Indices of the tasks that "all", numbers and ranges, or one instruction stand for.

    Raises ConfigurationError: no such task.
    """
    if text == "all":
        return tuple(range(len(suite_tasks(suite))))
    if text[:1].isdigit():
        return tuple(find_task(suite, number).index for number in parse_numbers(text, "tasks"))
    return (find_task(suite, text).index,)


def episode_keys(
    suite: str, tasks: Iterable[int], states: Sequence[int], seed: int = 0, variant: str = "", draw: str = ""
) -> list[EpisodeKey]:
    """One episode for each task and state.

    states: numbers of official initial states, all with `seed`; with a `draw` of `sim.tasks.DRAWS`, seeds that
        each draw a fresh state.
    Raises ConfigurationError: a task that lacks one of these states, or that draw.
    """
    if draw:
        check_draw(suite, draw)
    keys = []
    for task in tasks:
        count = len(load_init_states(find_task(suite, task)))
        if not draw and max(states) >= count:
            raise ConfigurationError(f"{suite} task {task} has no initial state {max(states)}; choose 0 to {count - 1}")
        for number in states:
            state, chosen = (draw, number) if draw else (number, seed)
            keys.append(EpisodeKey(suite, task, state, chosen, variant))
    return keys


def make_blocks(keys: Sequence[EpisodeKey], in_a_row: int, workers: int) -> list[list[EpisodeKey]]:
    """Episodes in the order of play: a few of one task, then a few of the next, round and round.

    A block of at most `in_a_row` uses one environment, which takes seconds to build; and a run that is stopped has
    about as many episodes of each task. Blocks are smaller where there would be fewer than `workers`.
    """
    in_a_row = max(1, min(in_a_row, -(-len(keys) // workers)))
    by_task: dict[tuple[str, int], list[EpisodeKey]] = {}
    for key in keys:
        by_task.setdefault((key.suite, key.task), []).append(key)
    longest = max((len(own) for own in by_task.values()), default=0)
    return [
        own[start : start + in_a_row]
        for start in range(0, longest, in_a_row)
        for own in by_task.values()
        if start < len(own)
    ]
