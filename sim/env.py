"""LIBERO as a Gymnasium environment, under OpenVLA's evaluation protocol by default."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from mllm.policy import PROPRIO_SIZES, Observation
from sim.errors import ConfigurationError, EnvironmentFault
from sim.render import check_renderer, make_renderer
from sim.stepping import STEPPERS, check_stepper
from sim.tasks import STEP_LIMITS, TaskSpec, asked, check_draw, check_suite, find_task, item_of, load_init_states
from sim.versions import provenance, warn_about_mujoco
from sim.world import CONTROL_FREQ, GL_BACKENDS, Privileged, World

NO_OP = np.array([0, 0, 0, 0, 0, 0, -1], np.float64)


@dataclass(frozen=True)
class EnvConfig:
    """Which task, seen and simulated how. The defaults are OpenVLA's protocol.

    suite, task: see `sim.tasks.find_task`.
    cameras: MuJoCo camera names; none means no rendering at all.  image_size: pixels, height and width.
    renderer: "official" (robosuite's pixels) or "fast"; a policy is trained and evaluated with the same one.
    stepper: "fast", or "official" (robosuite's own loop): the same states bit for bit, at twice the cost.
    settle_steps: no-op steps after a reset, while objects fall into place.
    step_limit: control steps before truncation; None is the suite's own.
    seed: drawn from at every reset, so that an episode does not depend on the ones before it.
    gl: "osmesa", "egl", or None for the MUJOCO_GL variable, else OSMesa.
    """

    suite: str = "libero_spatial"
    task: int | str = 0
    cameras: tuple[str, ...] = ("agentview", "robot0_eye_in_hand")
    image_size: int = 256
    renderer: str = "official"
    stepper: str = "fast"
    settle_steps: int = 10
    step_limit: int | None = None
    seed: int = 0
    gl: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cameras", tuple(self.cameras))
        check_suite(self.suite)
        check_renderer(self.renderer)
        check_stepper(self.stepper)
        for name, low, high in (("image_size", 1, 4096), ("settle_steps", 0, 10_000), ("seed", 0, 2**32 - 1)):
            value = getattr(self, name)
            if not (isinstance(value, (int, np.integer)) and low <= value <= high):
                raise ConfigurationError(f"EnvConfig.{name} is {value!r}: it must be an integer from {low} to {high}")
        if self.step_limit is not None and not (isinstance(self.step_limit, (int, np.integer)) and self.step_limit > 0):
            raise ConfigurationError(f"EnvConfig.step_limit is {self.step_limit!r}: it must be above 0, or None")
        if self.gl is not None and self.gl not in GL_BACKENDS:
            raise ConfigurationError(f"EnvConfig.gl is {self.gl!r}: choose one of {', '.join(GL_BACKENDS)}, or None")
        if len(set(self.cameras)) != len(self.cameras):
            raise ConfigurationError(f"EnvConfig.cameras names one twice: {', '.join(self.cameras)}")

    def episode_task(self, seed: int | None = None, options: Mapping[str, Any] | None = None) -> TaskSpec:
        """The task, with its instruction, of the episode that `LiberoEnv.reset` starts with these arguments."""
        start = (options or {}).get("init_state", 0)
        return asked(find_task(self.suite, self.task), start, self.seed if seed is None else seed)


class LiberoEnv(gymnasium.Env[dict[str, Any], np.ndarray]):
    """One LIBERO task.

    Action: (7,) in [-1, 1]: dx dy dz (1 = 0.05 m), axis-angle (1 = 0.5 rad), both in the world frame, and the gripper
    (-1 open, +1 close), at 20 Hz.
    Observation: {"images": {camera: (H, W, 3) uint8 RGB, upright}, "proprio": {"eef_pos": m and "eef_quat": xyzw in
    the world frame, "gripper_qpos": (2,) m, "joint_pos": (7,) rad, "joint_vel": (7,) rad/s}}, float64, taken at the
    instants at which robosuite takes its own.
    Reward is 1 in the step that reaches the goal, which ends the episode, and 0 before it.
    info: "success" bool; "step" control steps since settling; "stamp" simulated seconds since settling, of the
    observation; "timing" {"physics": s, "render": s}.
    """

    # Gymnasium declares it so: a plain attribute of the class.
    metadata = {"render_modes": [], "render_fps": CONTROL_FREQ}  # noqa: RUF012

    def __init__(self, config: EnvConfig | None = None) -> None:
        self.config = config = config or EnvConfig()
        warn_about_mujoco()
        self.task = find_task(config.suite, config.task)
        self.init_states = load_init_states(self.task)
        self.step_limit = STEP_LIMITS[config.suite] if config.step_limit is None else config.step_limit
        self._world = World(self.task, config.gl)
        try:
            self._camera_ids = {name: self._world.camera(name) for name in config.cameras}
            self._renderer = (
                make_renderer(config.renderer, self._world.model, self._world.data, self._world.gl)
                if config.cameras
                else None
            )
        except BaseException:
            self._world.close()
            raise
        self._stepper = STEPPERS[config.stepper](self._world)
        self._observation: dict[str, Any] = {}
        self._render_seconds = 0.0
        self._looking = True
        self._stamp = 0.0
        self._sampled_time = self._start_time = 0.0
        self._steps = 0
        self._running = False
        size = config.image_size
        box = gymnasium.spaces.Box
        self.action_space = box(-1.0, 1.0, (7,), np.float32)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "images": gymnasium.spaces.Dict(
                    {name: box(0, 255, (size, size, 3), np.uint8) for name in config.cameras}
                ),
                "proprio": gymnasium.spaces.Dict(
                    {name: box(-np.inf, np.inf, (length,), np.float64) for name, length in PROPRIO_SIZES.items()}
                ),
            }
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts an episode and lets it settle.

        seed: of this episode; None is the configuration's, every time.
        options: {"init_state": i} for the official initial state i (default 0), {"init_state": "sampled"} for objects
        placed at random by `seed` as LIBERO does, or {"init_state": "shuffled"} for an instruction about any of them,
        see `sim.tasks.DRAWS`; `task` has it then. Equal arguments give equal episodes, whatever came before.
        Raises ConfigurationError: unknown option or initial state.
        """
        super().reset(seed=seed)
        seed = self.config.seed if seed is None else seed
        options = dict(options or {})
        chosen = options.pop("init_state", 0)
        if options:
            raise ConfigurationError(f"unknown reset option {next(iter(options))!r}; the only one is 'init_state'")
        self._running = False
        self._looking = True
        self._render_seconds = 0.0
        started = time.perf_counter()
        state = self._init_state(chosen)
        settle = self.config.settle_steps
        # Only the last sample before the policy's first look is worth drawing.
        self._world.sampler = None if settle else self._sample
        self.task = self.config.episode_task(seed, {"init_state": chosen})
        shuffled = chosen == "shuffled"
        exchanged = shuffled and self.task.suite == "libero_object"
        self._world.reset(seed, state, item_of(self.task) if shuffled else None, exchanged)
        for left in range(settle, 0, -1):
            self._world.sampler = self._sample if left == 1 else None
            self._stepper.step(NO_OP)
        self._world.sampler = self._sample
        self._start_time = self._sampled_time
        self._stamp = 0.0
        self._steps = 0
        self._running = True
        return self._observation, self._info(False, time.perf_counter() - started)

    def _init_state(self, chosen: Any) -> np.ndarray | None:
        if isinstance(chosen, str):
            check_draw(self.task.suite, chosen)
            return None
        whole = isinstance(chosen, (int, np.integer)) and not isinstance(chosen, bool)
        if whole and 0 <= chosen < len(self.init_states):
            return self.init_states[int(chosen)]
        raise ConfigurationError(
            f"no initial state {chosen!r} in {self.task.suite} task {self.task.index}; "
            f"choose 0 to {len(self.init_states) - 1}, 'sampled' or 'shuffled'"
        )

    def step(self, action: np.ndarray, look: bool = True) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One control step of 1/20 s.

        look: whether to draw the images, which take most of a step's time; without, the observation has none.
        Raises ConfigurationError: wrong shape, NaN, a value outside [-1, 1], or no episode running.
        Raises EnvironmentFault: the simulation diverged.
        """
        if not self._running:
            raise ConfigurationError("no episode is running: call reset() before step()")
        command = self._check_action(action)
        self._looking = look
        self._render_seconds = 0.0
        started = time.perf_counter()
        success = self._stepper.step(command)
        elapsed = time.perf_counter() - started
        if self._world.diverged():
            self._running = False
            raise EnvironmentFault(f"the simulation diverged in step {self._steps + 1}: MuJoCo threw its state away")
        self._steps += 1
        self._stamp = self._sampled_time - self._start_time
        truncated = not success and self._steps >= self.step_limit
        self._running = not (success or truncated)
        return self._observation, float(success), success, truncated, self._info(success, elapsed)

    @staticmethod
    def _check_action(action: np.ndarray) -> np.ndarray:
        command = np.asarray(action, dtype=np.float64)
        if command.shape != (7,):
            raise ConfigurationError(f"an action has shape {command.shape}: it must be (7,)")
        if not (np.abs(command) <= 1.0).all():  # also false for NaN
            index = int(np.argmin(np.abs(command) <= 1.0))
            raise ConfigurationError(f"action[{index}] is {command[index]}: it must be from -1 to 1; clip it first")
        return command

    def _sample(self) -> None:
        """Takes the observation now; the world's clock says when."""
        data, robot = self._world.data, self._world.domain.robots[0]
        w, x, y, z = data.body(robot.robot_model.eef_name).xquat
        proprio = {
            "eef_pos": data.site_xpos[robot.eef_site_id].copy(),
            "eef_quat": np.array([x, y, z, w]),
            "gripper_qpos": data.qpos[robot._ref_gripper_joint_pos_indexes],
            "joint_pos": data.qpos[robot._ref_joint_pos_indexes],
            "joint_vel": data.qvel[robot._ref_joint_vel_indexes],
        }
        started = time.perf_counter()
        images = {}
        if self._renderer is not None and self._looking:
            for name, number in self._camera_ids.items():
                images[name] = np.ascontiguousarray(self._renderer.render(number, self.config.image_size)[::-1])
        self._render_seconds += time.perf_counter() - started
        self._sampled_time = float(data.time)
        self._observation = {"images": images, "proprio": proprio}

    def _info(self, success: bool, elapsed: float) -> dict[str, Any]:
        timing = {"physics": elapsed - self._render_seconds, "render": self._render_seconds}
        return {"success": success, "step": self._steps, "stamp": self._stamp, "timing": timing}

    def observation_for_policy(self, observation: dict[str, Any]) -> Observation:
        """The latest observation as a policy takes it; its stamp is simulated seconds since the episode began."""
        return Observation(images=observation["images"], proprio=observation["proprio"], stamp=self._stamp)

    def state(self) -> np.ndarray:
        """The simulator's state now: (1 + nq + nv,) float64, [time s, qpos, qvel]; the layout of initial states."""
        return self._world.state()

    def move_object(self, name: str, shift: np.ndarray) -> dict[str, Any]:
        """Moves an object now, as a hand from outside would between two steps, and takes the observation again.

        shift: (3,) m in the world frame.  Returns the observation.
        Raises ConfigurationError: the scene has no movable object of that name.
        """
        world = self._world.privileged()
        movable = world.movable
        if name not in movable:
            raise ConfigurationError(f"no movable object is called {name!r}; choose one of: {', '.join(movable)}")
        address = world.model.jnt_qposadr[world.model.body_jntadr[movable[name]]]
        world.data.qpos[address : address + 3] += shift
        world.domain.sim.forward()
        self._looking = True
        self._sample()
        return self._observation

    def privileged(self) -> Privileged:
        """The simulator itself, for scripted experts and tests; no policy may see it."""
        return self._world.privileged()

    def camera_info(self, camera: str) -> np.ndarray:
        """(3, 3) float64 intrinsics K of a pinhole without distortion, in pixels of the upright image.

        Pixel centres lie at whole numbers, as in ROS. Raises ConfigurationError: not one of the model's cameras.
        """
        number = self._world.camera(camera)
        size = self.config.image_size
        focal = 0.5 * size / math.tan(math.radians(float(self._world.model.cam_fovy[number])) / 2)
        centre = (size - 1) / 2
        return np.array([[focal, 0.0, centre], [0.0, focal, centre], [0.0, 0.0, 1.0]])

    def provenance(self) -> dict[str, str]:
        """What made this environment's results; see `sim.versions`."""
        config = self.config
        return provenance(
            renderer=config.renderer if config.cameras else "none",
            gl=self._world.gl,
            gl_renderer=self._renderer.gl_renderer() if self._renderer is not None else "none",
            stepper=config.stepper,
            image_size=str(config.image_size),
            settle_steps=str(config.settle_steps),
        )

    def close(self) -> None:
        """Frees the renderer and the simulation; a second call does nothing."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._world.close()


def openvla_view(image: np.ndarray) -> np.ndarray:
    """The view OpenVLA was trained on: an upright (H, W, 3) image mirrored left to right, contiguous.

    OpenVLA turns LIBERO's raw image by 180 degrees (`raw[::-1, ::-1]`); raw is bottom-up, so that is upright's mirror.
    """
    return np.ascontiguousarray(image[:, ::-1])
