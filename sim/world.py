"""The LIBERO scene of one task: built once, reset exactly as a hard reset would, without the rebuild."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sim.errors import ConfigurationError, EnvironmentFault
from sim.tasks import INSTALL_HINT, TaskSpec

GL_BACKENDS = ("osmesa", "egl")
CONTROL_FREQ = 20.0
MAX_PLACEMENT_TRIES = 100
# These describe shapes and pixels: no reset or step writes them, and they are hundreds of megabytes.
_BULK_FIELDS = ("mesh_", "tex_", "hfield_", "bvh_", "oct_", "skin_", "flex_", "names", "text_", "paths")


def select_gl(gl: str | None) -> str:
    """Fixes this process's OpenGL library: "osmesa", "egl", or None for what MUJOCO_GL says (else OSMesa).

    robosuite reads MUJOCO_GL once, at import. Raises ConfigurationError: unknown name, or robosuite has already been
    imported with another one.
    """
    wanted = gl or os.environ.get("MUJOCO_GL") or "osmesa"
    if wanted not in GL_BACKENDS:
        raise ConfigurationError(f"no renderer library is called {wanted!r}; choose one of: {', '.join(GL_BACKENDS)}")
    if "robosuite" in sys.modules:
        # robosuite itself falls back to EGL where the variable is unset.
        current = os.environ.get("MUJOCO_GL") or "egl"
        if current != wanted:
            raise ConfigurationError(
                f"robosuite was imported with MUJOCO_GL={current}, so this process cannot use {wanted!r}: "
                "start another process, or set the variable before the first environment"
            )
    os.environ["MUJOCO_GL"] = wanted
    return wanted


def _import_libero() -> Any:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            # robosuite asks for a file in its own package folder at every import; nothing here needs one.
            logging.disable(logging.WARNING)
            try:
                importlib.import_module("robosuite")
            finally:
                logging.disable(logging.NOTSET)
            return importlib.import_module("libero.libero.envs.env_wrapper")
    except (ImportError, AttributeError, OSError) as error:
        raise ConfigurationError(
            f"LIBERO cannot be imported with MUJOCO_GL={os.environ['MUJOCO_GL']} ({error}); {INSTALL_HINT}, "
            "and on Debian: apt install libosmesa6 libegl1 libgl1-mesa-dri"
        ) from error


@contextlib.contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """Seeds numpy's global generator, which LIBERO draws from, and gives the caller's back."""
    saved = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(saved)


def _small_fields(model: Any) -> dict[str, np.ndarray]:
    fields = (name for name in dir(model) if not name.startswith(("_", *_BULK_FIELDS)))
    arrays = {name: getattr(model, name) for name in fields}
    return {name: value for name, value in arrays.items() if isinstance(value, np.ndarray) and value.size}


@dataclass(frozen=True)
class Privileged:
    """Everything a scripted expert or a test may read, and a policy may not.

    model, data: mujoco.MjModel and mujoco.MjData, live.  domain: the robosuite environment under LIBERO.
    body_ids: object or fixture name -> MuJoCo body.  goal: predicates, each (name, object[, target]); all must hold.
    holds: evaluates one predicate now.
    """

    model: Any
    data: Any
    domain: Any
    body_ids: dict[str, int]
    goal: tuple[tuple[str, ...], ...]
    holds: Callable[[tuple[str, ...]], bool]

    @property
    def movable(self) -> dict[str, int]:
        """Those of `body_ids` that are not fixed to the scene."""
        return {name: body for name, body in self.body_ids.items() if self.model.body_dofnum[body] == 6}


class World:
    """One task's scene with the Panda in it.

    sampler: called by robosuite's own sampling clock (20 Hz) at the instants at which its observations are taken.
    """

    def __init__(self, task: TaskSpec, gl: str | None = None) -> None:
        self.task = task
        self.gl = select_gl(gl)
        wrapper = _import_libero()
        with contextlib.redirect_stdout(io.StringIO()), _numpy_seed(0):
            self.domain = wrapper.ControlEnv(
                bddl_file_name=str(task.bddl_file),
                has_offscreen_renderer=False,
                use_camera_obs=False,
                control_freq=CONTROL_FREQ,
                ignore_done=True,
                hard_reset=False,
            ).env
        import mujoco
        from robosuite.utils.observables import Observable, sensor

        self.model: Any = self.domain.sim.model._model
        self.data: Any = self.domain.sim.data._data
        # Building the scene already placed the fixtures, so what the XML says comes from a second compilation.
        pristine = _small_fields(mujoco.MjModel.from_xml_string(self.domain.model.get_xml()))
        mine = _small_fields(self.model)
        self._pristine = {name: value.copy() for name, value in pristine.items() if mine[name].flags.writeable}
        self._properties = {
            name: copy.deepcopy(item.object_properties)
            for name, item in self._objects()
            if hasattr(item, "object_properties")
        }
        self._goal = self.domain.parsed_problem["goal_state"]
        self._mujoco = mujoco
        self.domain.sim.reset = self._reset_data
        kinds = mujoco.mjtWarning
        self._divergences = [int(k) for k in (kinds.mjWARN_BADQPOS, kinds.mjWARN_BADQVEL, kinds.mjWARN_BADQACC)]
        self.sampler: Callable[[], None] | None = None

        @sensor(modality="sampler")
        def sample(_: dict[str, Any]) -> np.ndarray:
            if self.sampler is not None:
                self.sampler()
            return np.zeros(1)

        self.clock = Observable(name="sampler", sensor=sample, sampling_rate=CONTROL_FREQ, active=False)
        self.domain.add_observable(self.clock)

    def _objects(self) -> list[tuple[str, Any]]:
        return [*self.domain.objects_dict.items(), *self.domain.fixtures_dict.items()]

    def reset(
        self, seed: int, init_state: np.ndarray | None = None, item: str | None = None, exchanged: bool = False
    ) -> None:
        """Puts the scene where a hard reset after `seed` puts it; then, if given, sets an initial state.

        init_state: (1 + nq + nv,) float64, [time s, qpos, qvel].
        item: the name of the object that the goal is about; None is the task's.
        exchanged: the movable objects, but for those that others shall go into, exchange places by `seed`.
        The result depends on the arguments alone. LIBERO's own hard reset appends its drawer samplers once more at
        every reset, so the draws behind a fixture's pose depend on how many episodes came before; here they never do.
        Raises EnvironmentFault: no valid placement was found.
        """
        from robosuite.utils.errors import RandomizationError

        if init_state is not None and init_state.shape != (1 + self.model.nq + self.model.nv,):
            raise ConfigurationError(
                f"an initial state of shape {init_state.shape} does not fit this scene: it needs "
                f"({1 + self.model.nq + self.model.nv},), [time, qpos, qvel]"
            )
        with _numpy_seed(seed):
            for attempt in range(1, MAX_PLACEMENT_TRIES + 1):
                self._restore_model()
                try:
                    self.domain.reset()
                    break
                except RandomizationError as error:
                    if attempt == MAX_PLACEMENT_TRIES:
                        raise EnvironmentFault(
                            f"no valid object placement in {attempt} tries with seed {seed}"
                        ) from error
        if init_state is not None:
            self.domain.sim.set_state_from_flattened(init_state)
        if exchanged:
            self._exchange(np.random.default_rng([seed, 0, 0, 1]))
        self.domain.parsed_problem["goal_state"] = [
            [predicate, item or own, *rest] for predicate, own, *rest in self._goal
        ]
        if init_state is not None or item is not None or exchanged:
            self.domain.sim.forward()
            self.domain._check_success()
            self.domain._post_process()
            self.domain._update_observables(force=True)

    def _exchange(self, rng: np.random.Generator) -> None:
        """Objects exchange their places on the floor, and keep their own height and orientation."""
        targets = [target for _, _, *named in self._goal for target in named]
        items = [
            item for name, item in self.domain.objects_dict.items() if not any(t.startswith(name) for t in targets)
        ]
        addresses = np.array([self.model.joint(item.joints[0]).qposadr[0] for item in items])
        self.data.qpos[addresses[:, None] + (0, 1)] = self.data.qpos[rng.permutation(addresses)[:, None] + (0, 1)]

    def _reset_data(self) -> None:
        # A hard reset runs a forward pass on its new data and another for its new renderer, and what they leave in the
        # solver's warm start shows in the last bits of the first steps.
        self._mujoco.mj_resetData(self.model, self.data)
        self._mujoco.mj_forward(self.model, self.data)
        self._mujoco.mj_forward(self.model, self.data)

    def _restore_model(self) -> None:
        for name, value in self._pristine.items():
            getattr(self.model, name)[...] = value
        for name, item in self._objects():
            if name in self._properties:
                item.object_properties = copy.deepcopy(self._properties[name])
        # A hard reset builds a new gripper; a soft one keeps the last episode's command (OpenVLA's protocol is hard).
        gripper = self.domain.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)

    def state(self) -> np.ndarray:
        """(1 + nq + nv,) float64: [time s, qpos, qvel], the layout of initial states."""
        return np.concatenate([[self.data.time], self.data.qpos, self.data.qvel])

    def camera(self, name: str) -> int:
        """MuJoCo's number of a camera. Raises ConfigurationError: the scene has no such camera."""
        names = [self.model.camera(number).name for number in range(self.model.ncam)]
        if name not in names:
            raise ConfigurationError(f"no camera is called {name!r}; choose from: {', '.join(names)}")
        return names.index(name)

    def success(self) -> bool:
        """Whether every goal predicate holds now."""
        return bool(self.domain._check_success())

    def diverged(self) -> bool:
        """Whether numbers since the last reset became infinite or huge; MuJoCo then starts over without a word."""
        warnings = self.data.warning
        return any(warnings[kind].number for kind in self._divergences) or not np.isfinite(self.data.qpos).all()

    def privileged(self) -> Privileged:
        """Live, privileged access; see `Privileged`."""
        return Privileged(
            model=self.model,
            data=self.data,
            domain=self.domain,
            body_ids={name: int(body) for name, body in self.domain.obj_body_id.items()},
            goal=tuple(tuple(state) for state in self.domain.parsed_problem["goal_state"]),
            holds=lambda predicate: bool(self.domain._eval_predicate(list(predicate))),
        )

    def close(self) -> None:
        """Frees the simulation; a second call does nothing."""
        if self.domain is not None:
            self.domain.close()
            self.domain = self.model = self.data = None
