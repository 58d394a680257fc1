"""Parameters of the policy node, with the checks of everything that can be wrong before the policy is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashvla_ros.errors import ConfigurationError
from flashvla_ros.fields import json_object, param, require, require_positive
from mllm.errors import PolicyError
from mllm.reuse import ReuseConfig

MAX_MARKERS = 10_000
TUNABLE = ("reuse", "compress", "keep")  # parameters that are options of the policy, and change while it acts


@dataclass(frozen=True)
class PolicyParameters:
    policy: str = param("hold", "name in the flashvla.policies entry-point group, such as mini, or a folder of weights")
    policy_options: str = param("{}", "JSON object: keyword arguments of the policy's constructor")
    reuse: str = param(
        "",
        "off, paper, gated or a JSON object of mllm.reuse.ReuseConfig's fields: when the policy's last action is used "
        "again; empty = what policy_options say, else off",
        dynamic=True,
    )
    compress: str = param(
        "",
        "none, flashvla, tokencarve, fastv, random, uniform or a JSON object of mllm.compress.CompressConfig's fields: "
        "which visual tokens the decoder goes on with; empty = what policy_options say, else none",
        dynamic=True,
    )
    keep: int = param(0, "visual tokens that it keeps; 0 = what policy_options or compress say", dynamic=True)
    autostart: bool = param(True, "configure and activate by itself; false = wait for lifecycle transitions")
    instruction: str = param("", "instruction to start with; empty = wait for one on instruction_topic")
    cameras: tuple[str, ...] = param(
        ("agentview=agentview/image_raw",), "NAME=TOPIC of every camera; the policy sees the images under these names"
    )
    image_transport: str = param("raw", "raw (sensor_msgs/Image) or compressed (sensor_msgs/CompressedImage)")
    eef_pose_topic: str = param(
        "", "end-effector pose (geometry_msgs/PoseStamped, in frame_id) to observe; empty = none"
    )
    joint_states_topic: str = param("", "joint states (sensor_msgs/JointState) to observe; empty = none")
    arm_joints: tuple[str, ...] = param(
        tuple(f"panda_joint{i}" for i in range(1, 8)), "names in joint_states, in order"
    )
    gripper_joints: tuple[str, ...] = param(("panda_finger_joint1", "panda_finger_joint2"), "names in joint_states")
    sync_slop: float = param(0.02, "s; inputs of one observation may differ by this much in time")
    max_pause: float = param(
        1.0,
        "s between two observations that the policy answers; after a longer pause, and where stamps go back, it starts "
        "anew in place of carrying out what it had planned; must be above its latency",
    )
    image_qos: str = param("best_effort depth=2", "QoS of the cameras")
    state_qos: str = param("reliable depth=10", "QoS of pose and joint states")
    instruction_topic: str = param("instruction", "task in words (std_msgs/String, transient local); resets the policy")
    twist_topic: str = param("policy/command", "proposed twist (geometry_msgs/TwistStamped)")
    gripper_topic: str = param(
        "policy/gripper_command",
        "proposed gripper opening (sensor_msgs/JointState, m); empty = a robot without gripper, also for the gate",
    )
    command_qos: str = param("reliable depth=10", "QoS of the proposed commands")
    decision_topic: str = param(
        "command_gate/decision",
        "what the gate made of each command (diagnostic_msgs/DiagnosticArray): where it did not pass it unchanged, "
        "the policy reuses nothing that came before; empty = no gate",
    )
    max_opening: float = param(0.08, "m; widest gripper opening, what gripper -1 stands for")
    frame_id: str = param("world", "frame of the commands and of the pose; the policy's action frame must be this one")
    overlay: bool = param(
        True,
        "publish ~/overlay/CAMERA (sensor_msgs/Image): what the policy looked at, and whether it reused; drawn only "
        "where somebody subscribes, after the command is out",
        dynamic=True,
    )
    markers: int = param(
        40,
        "newest commands that ~/markers (visualization_msgs/MarkerArray) shows as displacements at the end effector, "
        "which eef_pose_topic tells, else strung together from the frame's origin; 0 = none",
        dynamic=True,
    )
    display_qos: str = param("reliable depth=2", "QoS of overlays and markers")

    def __post_init__(self) -> None:
        require_positive(self, "sync_slop", "max_pause", "max_opening")
        transports = ("raw", "compressed")
        require(self.image_transport in transports, "image_transport", self.image_transport, " or ".join(transports))
        require(len(self.cameras) > 0, "cameras", self.cameras, "at least one NAME=TOPIC")
        for entry in self.cameras:
            require(all(entry.partition("=")), "cameras", entry, "of the form NAME=TOPIC")
        names = self.camera_names()
        require(len(set(names)) == len(names), "cameras", self.cameras, "a list without a name twice")
        require(0 <= self.markers <= MAX_MARKERS, "markers", self.markers, f"0 to {MAX_MARKERS}")
        self.options()
        require(self.keep >= 0, "keep", self.keep, "0 or more")
        try:
            ReuseConfig.parse(self.reuse)
        except PolicyError as error:
            raise ConfigurationError(f"parameter 'reuse' is {self.reuse!r}: {error}") from error

    def camera_names(self) -> list[str]:
        return [entry.partition("=")[0] for entry in self.cameras]

    def options(self) -> dict[str, Any]:
        """The policy's keyword arguments. Reuse is always among them, so that it can be switched on."""
        given = {name: value for name in TUNABLE if (value := getattr(self, name))}
        return {"reuse": "off", **json_object("parameter 'policy_options'", self.policy_options), **given}
