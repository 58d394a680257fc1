"""Parameters of the simulator bridge, with the checks of everything that can be wrong before an episode."""

from __future__ import annotations

from dataclasses import dataclass

from flashvla_ros.errors import ConfigurationError
from flashvla_ros.fields import param, require, require_positive
from sim.env import EnvConfig
from sim.errors import ConfigurationError as SimConfigurationError
from sim.tasks import DRAWS, check_draw, find_task, load_init_states


@dataclass(frozen=True)
class BridgeParameters:
    suite: str = param(
        "libero_spatial", "libero_spatial, _object, _goal, _10 or _90; effective at the next ~/reset", dynamic=True
    )
    task: str = param("0", "index or instruction of the task; effective at the next ~/reset", dynamic=True)
    init_state: str = param(
        "0", "index of an official initial state, or sampled or shuffled; effective at the next ~/reset", dynamic=True
    )
    seed: int = param(0, "draws the fixtures' poses, and the objects' of a sampled state", dynamic=True)
    renderer: str = param("fast", "official (as published results) or fast (no reflections, no antialiasing)")
    stepper: str = param("fast", "official or fast (same states to 1e-8)")
    image_size: int = param(256, "pixels, height and width of both cameras")
    cameras: tuple[str, ...] = param(
        ("agentview=agentview", "robot0_eye_in_hand=wrist"),
        "CAMERA=TOPIC_PREFIX: LIBERO's camera and the prefix of its image_raw and camera_info topics",
    )
    settle_steps: int = param(10, "steps without motion before the episode, while objects fall into place")
    step_limit: int = param(0, "steps before the episode is a failure; 0 = the suite's")
    mode: str = param(
        "lockstep",
        "lockstep: wait for the command that answers each observation; realtime: step at 20 Hz whatever comes",
    )
    on_silence: str = param("zero", "realtime without a new command: hold the last one, or zero (stand still)")
    lockstep_timeout: float = param(10.0, "s; without the answering command for this long the episode is an error")
    before_episode: tuple[str, ...] = param(
        ("command_gate/ready", "policy/reset"),
        "services (std_srvs/Trigger) that must succeed, in this order, before the first observation of an episode: the "
        "gate is connected, the policy is, and has forgotten the last episode",
    )
    receivers: int = param(
        2,
        "lockstep: nodes that the first observation waits for: policy, gate, and whoever else must miss nothing",
    )
    autostart: bool = param(True, "start an episode at once; false = wait for ~/reset")
    twist_topic: str = param("command", "gated twist (geometry_msgs/TwistStamped)")
    gripper_topic: str = param("gripper_command", "gated gripper opening (sensor_msgs/JointState, m)")
    max_opening: float = param(0.08, "m; gripper opening that stands for -1")
    image_qos: str = param("reliable depth=5", "QoS of image_raw and camera_info; lockstep needs reliable")
    state_qos: str = param("reliable depth=10", "QoS of eef_pose and joint_states")
    command_qos: str = param("reliable depth=10", "QoS of the gated commands")
    trace_file: str = param(
        "", "file (.npz) that gets every simulator state, action and timing of an episode; empty = none"
    )

    def __post_init__(self) -> None:
        require_positive(self, "lockstep_timeout", "max_opening")
        require(self.mode in ("lockstep", "realtime"), "mode", self.mode, "lockstep or realtime")
        require(self.on_silence in ("hold", "zero"), "on_silence", self.on_silence, "hold or zero")
        require(self.step_limit >= 0, "step_limit", self.step_limit, "0 (the suite's) or more")
        require(self.receivers >= 2, "receivers", self.receivers, "2 (policy and gate) or more")
        for entry in self.cameras:
            require(all(entry.partition("=")), "cameras", entry, "of the form CAMERA=TOPIC_PREFIX")
        try:
            config, state = self.env_config(), self.initial_state()
            count = len(load_init_states(find_task(config.suite, config.task)))
            if isinstance(state, str):
                check_draw(config.suite, state)
        except SimConfigurationError as error:
            raise ConfigurationError(str(error)) from error
        known = isinstance(state, str) or state < count
        require(known, "init_state", self.init_state, f"0 to {count - 1}: {self.suite} has no other")

    def env_config(self) -> EnvConfig:
        return EnvConfig(
            suite=self.suite,
            task=int(self.task) if self.task.isdigit() else self.task,
            cameras=tuple(entry.partition("=")[0] for entry in self.cameras),
            image_size=self.image_size,
            renderer=self.renderer,
            stepper=self.stepper,
            settle_steps=self.settle_steps,
            step_limit=self.step_limit or None,
            seed=self.seed,
        )

    def initial_state(self) -> int | str:
        if self.init_state in DRAWS:
            return self.init_state
        wanted = f"an index of 0 or more, {' or '.join(DRAWS)}"
        require(self.init_state.isdigit(), "init_state", self.init_state, wanted)
        return int(self.init_state)
