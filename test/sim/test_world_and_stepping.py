"""Quick resets against robosuite's hard resets, and the fast stepper against robosuite's own, task by task."""

import time
from collections.abc import Iterator

import numpy as np
import pytest

from sim.bench import sample_actions
from sim.stepping import STEPPERS
from sim.tasks import find_task, load_init_states
from sim.world import World

# Table, with the bowl in a drawer; floor, with many still objects; kitchen, with a drawer that starts open.
TASKS = (("libero_spatial", 4), ("libero_object", 2), ("libero_10", 3))
STEPS = 120


@pytest.fixture(scope="module", params=TASKS, ids=lambda task: f"{task[0]}-{task[1]}")
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(find_task(*request.param))
    yield made
    made.close()


def run(world: World, stepper: str, init_state: np.ndarray | None) -> tuple[np.ndarray, list[bool]]:
    """States (STEPS, dim) and successes of an episode."""
    made = STEPPERS[stepper](world)
    world.reset(3, init_state)
    states, successes = [], []
    for action in sample_actions(STEPS).astype(np.float64):
        successes.append(made.step(action))
        states.append(world.state())
    return np.array(states), successes


@pytest.mark.parametrize("kind", ["initial state", "sampled"])
def test_the_fast_stepper_gives_robosuite_s_states_and_successes_bit_for_bit(world: World, kind: str) -> None:
    init_state = load_init_states(world.task)[1] if kind == "initial state" else None
    fast, fast_successes = run(world, "fast", init_state)
    official, official_successes = run(world, "official", init_state)
    np.testing.assert_array_equal(fast, official)
    assert fast_successes == official_successes


def test_the_fast_stepper_takes_clearly_less_cpu_time(world: World) -> None:
    # 0.33 to 0.55 of it, by task and machine; `flashvla bench sim` measures.
    steppers = {name: STEPPERS[name](world) for name in ("official", "fast")}
    best = {name: np.full(20, np.inf) for name in steppers}
    for _ in range(8):
        for name, stepper in steppers.items():
            world.reset(0, load_init_states(world.task)[0])
            for step, action in enumerate(sample_actions(20).astype(np.float64)):
                started = time.process_time()
                stepper.step(action)
                best[name][step] = min(best[name][step], time.process_time() - started)
    assert best["fast"].sum() <= 0.75 * best["official"].sum()


def after_reset(world: World) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What a reset decides, and the states of the five steps after it."""
    model = world.model
    decided = [world.state(), model.body_pos.copy(), model.body_quat.copy(), model.site_rgba.copy()]
    stepper, states = STEPPERS["official"](world), []
    for action in sample_actions(5).astype(np.float64):
        stepper.step(action)
        states.append(world.state())
    return decided, states


@pytest.mark.parametrize("kind", ["initial state", "sampled"])
def test_a_quick_reset_is_a_hard_reset_bit_for_bit(world: World, kind: str) -> None:
    init_state = load_init_states(world.task)[4] if kind == "initial state" else None
    run(world, "fast", None)  # an episode to forget
    world.reset(11, init_state)
    quick, quick_states = after_reset(world)

    hard = World(world.task)
    domain = hard.domain
    domain.hard_reset, domain.object_property_initializers = True, []
    initialize = domain._initialize_sim

    def initialize_as_with_a_renderer() -> None:
        initialize()
        domain.sim.forward()  # robosuite's renderer runs this when it is made

    domain._initialize_sim = initialize_as_with_a_renderer
    saved = np.random.get_state()
    np.random.seed(11)
    domain.reset()
    np.random.set_state(saved)
    if init_state is not None:
        domain.sim.set_state_from_flattened(init_state)
        domain.sim.forward()
        domain._check_success()
        domain._post_process()
    hard.model, hard.data = domain.sim.model._model, domain.sim.data._data
    official, official_states = after_reset(hard)
    hard.close()
    for mine, theirs in zip(quick, official, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(quick_states, official_states)
