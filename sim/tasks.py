"""LIBERO's suites, tasks and initial states, without building a simulator."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from sim.errors import ConfigurationError

INSTALL_HINT = "install it with: pip install 'flashvla_ros[sim]'"

# Control steps an episode may take, after settling. Source: OpenVLA's LIBERO evaluation, where libero_90 has 400.
STEP_LIMITS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
SUITES = tuple(STEP_LIMITS)

# How a start is drawn by a seed, as against an official initial state: "sampled" places objects at random as LIBERO
# does. LIBERO asks for one object in one scene, so that words are hardly needed; "shuffled" asks for any that a task of
# the suite is about (our choice): in libero_object, where LIBERO always puts that one in the same place, objects
# exchange places as well; in libero_spatial every scene has a second bowl, which lies where another task's does.
DRAWS = ("sampled", "shuffled")
SHUFFLED_SUITES = ("libero_spatial", "libero_object")
BOWL = "akita_black_bowl_"  # 1 is what a task of libero_spatial is about


@dataclass(frozen=True)
class TaskSpec:
    """One task of one suite.

    suite: one of `SUITES`.  index: position in the suite's default order, from 0.
    name: the package's unique name.  language: the instruction a policy is given.
    bddl_file, init_states_file: absolute paths inside the installed package.
    """

    suite: str
    index: int
    name: str
    language: str
    bddl_file: Path
    init_states_file: Path


def check_suite(suite: str) -> None:
    """Raises ConfigurationError unless `suite` is one of `SUITES`."""
    if suite not in STEP_LIMITS:
        raise ConfigurationError(f"no suite is called {suite!r}; choose one of: {', '.join(SUITES)}")


def check_draw(suite: str, draw: str) -> None:
    """Raises ConfigurationError unless starts of `suite` can be drawn in the way of `DRAWS` called `draw`."""
    if draw not in DRAWS or (draw == "shuffled" and suite not in SHUFFLED_SUITES):
        raise ConfigurationError(
            f"no start is {draw!r} in {suite}: choose {' or '.join(DRAWS)} (only {', '.join(SHUFFLED_SUITES)})"
        )


@cache
def suite_tasks(suite: str) -> tuple[TaskSpec, ...]:
    """Every task of `suite`, in the package's default order (the order of published results)."""
    check_suite(suite)
    try:
        # The package announces its task order on stdout, which belongs to the caller.
        with contextlib.redirect_stdout(io.StringIO()):
            from libero.libero import benchmark, get_libero_path

            tasks = benchmark.get_benchmark(suite)(0).tasks
    except ImportError as error:
        raise ConfigurationError(f"LIBERO cannot be imported ({error}); {INSTALL_HINT}") from error
    bddl, states = Path(get_libero_path("bddl_files")), Path(get_libero_path("init_states"))
    return tuple(
        TaskSpec(
            suite=suite,
            index=index,
            name=task.name,
            language=task.language,
            bddl_file=(bddl / task.problem_folder / task.bddl_file).resolve(),
            init_states_file=(states / task.problem_folder / f"{task.init_states_file}.npz").resolve(),
        )
        for index, task in enumerate(tasks)
    )


def find_task(suite: str, task: int | str) -> TaskSpec:
    """The task of `suite` at an index, with a name, or with an instruction (compared without case).

    Raises ConfigurationError: unknown suite or task, or an instruction that several tasks of the suite share.
    """
    tasks = suite_tasks(suite)
    if isinstance(task, (int, np.integer)) and not isinstance(task, bool):
        if not 0 <= task < len(tasks):
            raise ConfigurationError(f"{suite} has no task {task}; choose 0 to {len(tasks) - 1}")
        return tasks[int(task)]
    if not isinstance(task, str):
        raise ConfigurationError(f"a task is an index or an instruction, not {task!r}")
    wanted = task.strip().lower()
    found = [spec for spec in tasks if wanted in (spec.language.lower(), spec.name.lower())]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigurationError(
            f"{suite} has {len(found)} tasks called {task!r}; choose one by index or name: "
            + ", ".join(f"{spec.index} ({spec.name})" for spec in found)
        )
    raise ConfigurationError(
        f"{suite} has no task called {task!r}; choose one of: "
        + "; ".join(f"{spec.index} {spec.language!r}" for spec in tasks)
    )


def item_of(task: TaskSpec) -> str:
    """The body in its scene that a task of `SHUFFLED_SUITES` is about, by its instruction; see `asked`.

    In libero_object "pick up the milk and place ..." is about milk_1. In libero_spatial it is the second bowl where the
    instruction is not the scene's own.
    """
    if task.suite == "libero_spatial":
        own = suite_tasks(task.suite)[task.index].language
        return f"{BOWL}{1 if task.language == own else 2}"
    return task.language.removeprefix("pick up the ").partition(" and place")[0].replace(" ", "_") + "_1"


def possible(task: TaskSpec) -> tuple[TaskSpec, ...]:
    """Of `SHUFFLED_SUITES`, the tasks whose instruction can be followed in the scene of `task`, itself among them."""
    if task.suite == "libero_spatial":
        places = {_place(task, 1), _place(task, 2)}
        return tuple(other for other in suite_tasks(task.suite) if _place(other, 1) in places)
    scene = task.bddl_file.read_text(encoding="utf-8")
    return tuple(other for other in suite_tasks(task.suite) if item_of(other) in scene)


def _place(task: TaskSpec, bowl: int) -> str:
    # Only the initial state says (On BOWL REGION); the goal's (On BOWL plate_1) comes after it.
    found = re.search(rf"\((?:On|In) {BOWL}{bowl} (\w+)\)", task.bddl_file.read_text(encoding="utf-8"))
    if found is None:
        raise ConfigurationError(f"{task.bddl_file} does not say where {BOWL}{bowl} lies")
    return found[1]


def asked(task: TaskSpec, start: object, seed: int) -> TaskSpec:
    """`task` with the instruction of an episode from a start: its own, or, "shuffled", the one that `seed` draws."""
    if start != "shuffled":
        return task
    others = possible(task)
    # By the task too, or one seed would ask for the same place in every task's list. (The 2 keeps draws for different
    # purposes apart; numpy fills seeds up with zeros.)
    rng = np.random.default_rng([seed, SUITES.index(task.suite), task.index, 2])
    return replace(task, language=others[int(rng.integers(len(others)))].language)


def load_init_states(task: TaskSpec) -> np.ndarray:
    """The task's official initial states: (n, 1 + nq + nv) float64, rows of [time s, qpos, qvel]; read-only.

    Fixtures (cabinet, stove, rack) are not in them: their poses are drawn at reset.
    Raises ConfigurationError: the file is missing or is not such an array.
    """
    path = task.init_states_file
    if not path.is_file():
        raise ConfigurationError(f"{task.suite} task {task.index} has no initial states at {path}; {INSTALL_HINT}")
    with np.load(path, allow_pickle=False) as archive:
        states = np.asarray(archive["states"])
    if states.ndim != 2 or states.dtype.kind != "f" or not np.isfinite(states).all():
        raise ConfigurationError(
            f"{path} holds {states.dtype} of shape {states.shape}; it must be finite (n, dim) floats"
        )
    states = states.astype(np.float64)
    states.setflags(write=False)
    return states
