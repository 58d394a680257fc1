"""The policy as a lifecycle node: newest synchronised observation in, command stamped with that observation out."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger

from flashvla_ros.diagnostics import (
    ERROR, OK, STALE, WARN, Diagnostics, Window, describe, status, status_array,
)
from flashvla_ros.errors import ConfigurationError, MessageError
from flashvla_ros.fields import param, require, require_positive
from flashvla_ros.messages import (
    action_to_twist, gripper_message, read_compressed, read_image, read_pose, stamp_ns, to_stamp, twist_message,
)
from flashvla_ros.parameters import NodeParameters
from flashvla_ros.qos import LATCHED, parse_qos
from flashvla_ros.runner import run_node
from flashvla_ros.sync import ApproximateSync
from mllm.errors import PolicyError
from mllm.policy import ActionStep, Observation, Policy, check_action, make_policy

RESET_LIMIT = 10.0  # s that ~/reset waits for the inference thread


@dataclass(frozen=True)
class PolicyParameters:
    policy: str = param("hold", "name in the flashvla.policies entry-point group: hold, replay, ...")
    policy_options: str = param("{}", "JSON object: keyword arguments of the policy's constructor")
    autostart: bool = param(True, "configure and activate by itself; false = wait for lifecycle transitions")
    instruction: str = param("", "instruction to start with; empty = wait for one on instruction_topic")
    cameras: tuple[str, ...] = param(("agentview=agentview/image_raw",), "NAME=TOPIC of every camera; the policy "
                                     "sees the images under these names")
    image_transport: str = param("raw", "raw (sensor_msgs/Image) or compressed (sensor_msgs/CompressedImage; topics "
                                 "then end in /compressed)")
    eef_pose_topic: str = param("", "end-effector pose (geometry_msgs/PoseStamped), part of the observation; empty = none")
    joint_states_topic: str = param("", "joint states (sensor_msgs/JointState), part of the observation; empty = none")
    arm_joints: tuple[str, ...] = param(tuple(f"panda_joint{i}" for i in range(1, 8)), "names in joint_states, in order")
    gripper_joints: tuple[str, ...] = param(("panda_finger_joint1", "panda_finger_joint2"), "names in joint_states")
    sync_slop: float = param(0.02, "s; inputs of one observation may differ by this much in time")
    image_qos: str = param("best_effort depth=2", "QoS of the cameras")
    state_qos: str = param("reliable depth=10", "QoS of pose and joint states")
    instruction_topic: str = param("instruction", "task in words (std_msgs/String, transient local); a new one resets "
                                   "the policy")
    twist_topic: str = param("policy/command", "proposed twist (geometry_msgs/TwistStamped)")
    gripper_topic: str = param("policy/gripper_command", "proposed gripper opening (sensor_msgs/JointState, m)")
    command_qos: str = param("reliable depth=10", "QoS of the proposed commands")
    max_opening: float = param(0.08, "m; widest gripper opening, what gripper -1 stands for")
    frame_id: str = param("world", "frame of the commands; the policy's action frame must be this one")

    def __post_init__(self) -> None:
        require_positive(self, "sync_slop", "max_opening")
        require(self.image_transport in ("raw", "compressed"), "image_transport", self.image_transport,
                "raw or compressed")
        require(len(self.cameras) > 0, "cameras", self.cameras, "at least one NAME=TOPIC")
        for entry in self.cameras:
            name, _, topic = entry.partition("=")
            require(bool(name and topic), "cameras", entry, "of the form NAME=TOPIC")
        names = [entry.partition("=")[0] for entry in self.cameras]
        require(len(set(names)) == len(names), "cameras", self.cameras, "a list without a name twice")
        try:
            options = json.loads(self.policy_options)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"parameter 'policy_options' is not JSON: {error}") from error
        require(isinstance(options, dict), "policy_options", self.policy_options, "a JSON object")


@dataclass
class Inbox:
    """What the inference thread works on, all under one lock: the newest observation only, never a queue."""

    lock: threading.Condition = field(default_factory=threading.Condition)
    observation: tuple[int, dict[str, Any]] | None = None
    reset_to: str | None = None  # instruction to reset the policy with, before anything else
    active: bool = False
    ended: bool = False


class PolicyNode(LifecycleNode):
    """One executor thread for messages, one inference thread that owns the policy."""

    def __init__(self) -> None:
        super().__init__("policy", automatically_declare_parameters_from_overrides=True)
        self._params = NodeParameters(self, PolicyParameters)
        self._policy: Policy | None = None
        self._instruction = self._params.value.instruction
        self._fault = ""
        self._received = self._answered = self._replaced = self._refused = 0
        self._latency, self._period = Window(), Window()
        self._inbox = Inbox()
        self._thread: threading.Thread | None = None
        self._io: list[Any] = []
        p = self._params.value
        # Before the cameras: when both wait, an executor serves an instruction before the frames that follow it.
        self.create_subscription(String, p.instruction_topic, self._on_instruction, LATCHED)
        self.create_service(Trigger, "~/reset", self._on_reset)
        command_qos = parse_qos(p.command_qos, "command_qos")
        self._twists = self.create_publisher(TwistStamped, p.twist_topic, command_qos)
        self._grippers = self.create_publisher(JointState, p.gripper_topic, command_qos)
        self._steps = self.create_publisher(DiagnosticArray, "~/step", command_qos)
        self._image_qos = parse_qos(p.image_qos, "image_qos")
        self._state_qos = parse_qos(p.state_qos, "state_qos")
        self._diagnostics = Diagnostics(self, self._report)

    # ------------------------------------------------------------------ lifecycle

    def start(self) -> None:
        """Configures and activates, if `autostart` says so. Raises ConfigurationError when that fails."""
        if not self._params.value.autostart:
            return
        for trigger in (self.trigger_configure, self.trigger_activate):
            if trigger() is not TransitionCallbackReturn.SUCCESS:
                raise ConfigurationError(f"node '{self.get_name()}' cannot start: {self._fault or 'see its log'}")

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Loads the policy and warms it up."""
        p = self._params.value
        try:
            self._policy = make_policy(p.policy, **json.loads(p.policy_options))
            if self._policy.action_spec.frame != p.frame_id:
                raise PolicyError(f"policy '{p.policy}' acts in frame '{self._policy.action_spec.frame}', but parameter "
                                  f"'frame_id' is '{p.frame_id}'")
            warm_up = getattr(self._policy, "warm_up", None)
            if warm_up is not None:
                warm_up()
        except Exception as error:
            return self._failed(f"policy '{p.policy}' cannot be loaded: {error}", error)
        self._subscribe()
        self._inbox = Inbox(reset_to=self._instruction or None)
        self._thread = threading.Thread(target=self._infer, name="inference", daemon=True)
        self._thread.start()
        self.get_logger().info(f"configured with policy '{p.policy}'")
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        with self._inbox.lock:
            self._inbox.active, self._inbox.observation = True, None
        self.get_logger().info(f"active; instruction: {self._instruction or '(waiting for one)'}")
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop_commanding()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._end_inference()
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop_commanding()
        self._end_inference()
        return super().on_shutdown(state)

    def close(self) -> None:
        """The last proposal is to stand still."""
        self._stop_commanding()
        self._end_inference()

    def _failed(self, message: str, error: Exception) -> TransitionCallbackReturn:
        self._fault = message
        expected = isinstance(error, (PolicyError, ConfigurationError))
        self.get_logger().error(message if expected else describe(error))
        return TransitionCallbackReturn.FAILURE

    def _stop_commanding(self) -> None:
        with self._inbox.lock:
            was_active, self._inbox.active, self._inbox.observation = self._inbox.active, False, None
            if was_active:  # under the lock: the inference thread publishes under it too, so this is the last word
                stamp = self.get_clock().now().to_msg()
                self._twists.publish(twist_message(np.zeros(3), np.zeros(3), stamp, self._params.value.frame_id))

    def _end_inference(self) -> None:
        with self._inbox.lock:
            self._inbox.ended = True
            self._inbox.lock.notify_all()
        if self._thread is not None:
            self._thread.join(RESET_LIMIT)
            self._thread = None
        for subscription in self._io:
            self.destroy_subscription(subscription)
        self._io.clear()
        self._policy = None

    # ------------------------------------------------------------------ inputs

    def _subscribe(self) -> None:
        p = self._params.value
        inputs: list[tuple[str, Any, str, Any]] = []
        compressed = p.image_transport == "compressed"
        for entry in p.cameras:
            name, _, topic = entry.partition("=")
            inputs.append((f"image:{name}", CompressedImage if compressed else Image, topic, self._image_qos))
        if p.eef_pose_topic:
            inputs.append(("eef_pose", PoseStamped, p.eef_pose_topic, self._state_qos))
        if p.joint_states_topic:
            inputs.append(("joint_states", JointState, p.joint_states_topic, self._state_qos))
        self._sync = ApproximateSync([name for name, *_ in inputs], int(p.sync_slop * 1e9))
        for name, kind, topic, qos in inputs:
            self._io.append(self.create_subscription(
                kind, topic, lambda message, name=name: self._on_input(name, message), qos))

    def _on_input(self, name: str, message: Any) -> None:
        matched = self._sync.add(name, stamp_ns(message.header.stamp), message)
        if matched is None:
            return
        self._received += 1
        with self._inbox.lock:
            if self._inbox.active and not self._fault:
                self._replaced += self._inbox.observation is not None
                self._inbox.observation = matched
                self._inbox.lock.notify_all()

    def _on_instruction(self, message: String) -> None:
        self._instruction = message.data
        self.get_logger().info(f"instruction: {message.data}")
        self._request_reset()

    def _request_reset(self) -> None:
        self._fault = ""
        with self._inbox.lock:
            self._inbox.reset_to, self._inbox.observation = self._instruction, None
            self._inbox.lock.notify_all()

    def _on_reset(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Starts an episode: when this answers, the policy has forgotten the last one."""
        if self._thread is None:
            response.success, response.message = False, "not configured"
            return response
        self._request_reset()
        with self._inbox.lock:
            done = self._inbox.lock.wait_for(lambda: self._inbox.reset_to is None, RESET_LIMIT)
        response.success = done and not self._fault
        response.message = self._fault or ("reset" if done else f"the policy is busy for more than {RESET_LIMIT} s")
        return response

    # ------------------------------------------------------------------ inference thread

    def _infer(self) -> None:
        inbox, policy = self._inbox, self._policy
        assert policy is not None
        while True:
            with inbox.lock:
                inbox.lock.wait_for(lambda: inbox.ended or inbox.reset_to is not None
                                    or (inbox.observation is not None and self._instruction and not self._fault))
                if inbox.ended:
                    return
                reset_to, work = inbox.reset_to, None
                if reset_to is None:
                    work, inbox.observation = inbox.observation, None
            try:
                if reset_to is not None:
                    policy.reset(reset_to)
                elif work is not None:
                    self._answer(policy, *work)
            except MessageError as error:
                self._refused += 1
                self.get_logger().warning(f"observation dropped: {error}", throttle_duration_sec=1.0)
            except Exception as error:  # a policy's error must stop the robot, not the node
                self._fault = f"policy failed: {error}"
                self.get_logger().error(describe(error))
                self._diagnostics.publish()
            if reset_to is not None:
                with inbox.lock:
                    if inbox.reset_to is reset_to:
                        inbox.reset_to = None
                    inbox.lock.notify_all()

    def _answer(self, policy: Policy, stamp: int, messages: dict[str, Any]) -> None:
        start = time.perf_counter()
        observation = self._observation(stamp, messages)
        acting = time.perf_counter()
        step = policy.act(observation)
        end = time.perf_counter()
        spec, p = policy.action_spec, self._params.value
        linear, angular, opening = action_to_twist(check_action(step.action), spec, p.max_opening)
        ros_stamp = to_stamp(stamp)
        with self._inbox.lock:
            if not self._inbox.active:
                return
            self._grippers.publish(gripper_message(opening, ros_stamp))
            self._twists.publish(twist_message(linear, angular, ros_stamp, p.frame_id))
        self._answered += 1
        self._latency.add(end - start)
        self._period.add(1.0 / spec.control_freq)
        self._publish_step(ros_stamp, step, decode=acting - start, act=end - acting)

    def _observation(self, stamp: int, messages: dict[str, Any]) -> Observation:
        images, proprio = {}, {}
        for name, message in messages.items():
            kind, _, camera = name.partition(":")
            if kind == "image":
                images[camera] = read_compressed(message) if isinstance(message, CompressedImage) else read_image(message)
            elif kind == "eef_pose":
                proprio["eef_pos"], proprio["eef_quat"] = read_pose(message)
            else:
                positions = dict(zip(message.name, message.position, strict=False))
                p = self._params.value
                missing = [j for j in (*p.arm_joints, *p.gripper_joints) if j not in positions]
                if missing:
                    raise MessageError(f"joint states lack {', '.join(missing)}; they have {', '.join(message.name)}")
                proprio["joint_pos"] = np.array([positions[j] for j in p.arm_joints])
                proprio["gripper_qpos"] = np.array([positions[j] for j in p.gripper_joints])
        return Observation(images=images, proprio=proprio, stamp=stamp * 1e-9)

    def _publish_step(self, stamp: Any, step: ActionStep, **seconds: float) -> None:
        stages = {**seconds, **step.timing}
        values = {**{f"{k}_ms": f"{v * 1e3:.3f}" for k, v in stages.items()}, **step.flags}
        self._steps.publish(status_array(stamp, status(self.get_name(), OK, "computed", values)))

    # ------------------------------------------------------------------ report

    def _report(self) -> tuple[bytes, str, dict[str, object]]:
        values = {"received": self._received, "answered": self._answered, "replaced": self._replaced,
                  "refused": self._refused, "instruction": self._instruction, **self._latency.summary("latency")}
        if self._fault:
            return ERROR, self._fault, values
        if not self._inbox.active:
            return STALE, "not active", values
        if not self._instruction:
            return WARN, "waiting for an instruction", values
        if not self._answered:
            return WARN, "waiting for observations", values
        if self._latency.percentile_ms(50) > self._period.percentile_ms(50):
            return WARN, (f"latency {self._latency.percentile_ms(50):.1f} ms exceeds the control period "
                          f"{self._period.percentile_ms(50):.1f} ms"), values
        return OK, "acting", values


def main() -> int:
    def make() -> PolicyNode:
        node = PolicyNode()
        node.start()
        return node

    return run_node(make)


if __name__ == "__main__":
    sys.exit(main())
