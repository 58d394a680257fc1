"""The policy as a lifecycle node: newest synchronised observation in, command stamped with that observation out."""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import Any

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.duration import Duration
from rclpy.exceptions import InvalidTopicNameException
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger

from flashvla_ros.diagnostics import ERROR, OK, STALE, WARN, Diagnostics, Report, Window, describe, status, status_array
from flashvla_ros.display import Display
from flashvla_ros.errors import ConfigurationError, MessageError
from flashvla_ros.gate import Verdict
from flashvla_ros.inference import Inference
from flashvla_ros.messages import (
    action_to_twist,
    gripper_message,
    read_compressed,
    read_image,
    read_joints,
    read_pose,
    stamp_ns,
    to_stamp,
    twist_message,
)
from flashvla_ros.parameters import NodeParameters
from flashvla_ros.policy_parameters import TUNABLE, PolicyParameters
from flashvla_ros.qos import LATCHED, parse_qos
from flashvla_ros.runner import run_node
from flashvla_ros.sync import ApproximateSync
from mllm.errors import PolicyError
from mllm.policy import ActionStep, Observation, Policy, Tunable, check_action, make_policy
from mllm.reuse import Reason

BUSY_LIMIT = 10.0  # s that ~/reset, a parameter and the end wait for the step the policy is in


class PolicyNode(LifecycleNode):
    """One executor thread for messages; `Inference` owns the policy in another."""

    def __init__(self) -> None:
        super().__init__("policy", automatically_declare_parameters_from_overrides=True)
        self._params = NodeParameters(self, PolicyParameters, self._on_change)
        p = self._params.value
        self._policy: Policy | None = None
        self._inference: Inference | None = None
        self._instruction = p.instruction
        self._load_error = ""
        self._answered = self._reused = self._refused = self._corrected = self._pauses = 0
        self._reasons: Counter[str | None] = Counter()
        self._latency = Window()
        self._opening: float | None = None  # m, the last one proposed; None: the robot stands still
        self._inputs: list[Any] = []
        # Before the cameras: when both wait, an executor serves an instruction before the frames that follow it.
        self.create_subscription(String, p.instruction_topic, self._on_instruction, LATCHED)
        self.create_service(Trigger, "~/reset", self._on_reset)
        command_qos = parse_qos(p.command_qos, "command_qos")
        if p.decision_topic:
            self.create_subscription(DiagnosticArray, p.decision_topic, self._on_decision, command_qos)
        self._twists = self.create_publisher(TwistStamped, p.twist_topic, command_qos)
        self._grippers = self.create_publisher(JointState, p.gripper_topic, command_qos) if p.gripper_topic else None
        self._steps = self.create_publisher(DiagnosticArray, "~/step", command_qos)
        self._display = Display(self, p.camera_names(), parse_qos(p.display_qos, "display_qos"))
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
                raise ConfigurationError(f"node '{self.get_name()}' cannot start: {self._load_error or 'see its log'}")

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Loads the policy, warms it up and subscribes to its inputs."""
        p = self._params.value
        try:
            self._policy = make_policy(p.policy, **p.options())
            frame = self._policy.action_spec.frame
            if frame != p.frame_id:
                raise PolicyError(f"it acts in frame '{frame}', but parameter 'frame_id' is '{p.frame_id}'")
            warm_up = getattr(self._policy, "warm_up", None)
            if warm_up is not None:
                warm_up()
            self._display.begin(getattr(self._policy, "layout", None))
            self._inference = Inference(self._policy, self._answer, self._on_error, self._on_begin, p.max_pause)
            if self._instruction:
                self._inference.reset(self._instruction)
            self._subscribe()
        except Exception as error:  # rclpy drops it without a word; whatever was raised, the node lives and says so
            self._load_error = f"cannot be configured with policy '{p.policy}': {error}"
            expected = isinstance(error, (PolicyError, InvalidTopicNameException))
            self.get_logger().error(self._load_error if expected else describe(error))
            self._unload()
            return TransitionCallbackReturn.FAILURE
        self._load_error = ""
        self.get_logger().info(f"configured with policy '{p.policy}'")
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        assert self._inference is not None
        self._inference.activate()
        self._inference.wait_until_reset(BUSY_LIMIT)  # who activates and then shows an image gets an answer
        self.get_logger().info(f"active; instruction: {self._instruction or '(waiting for one)'}")
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stand_still()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._unload()
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.close()
        return super().on_shutdown(state)

    def close(self) -> None:
        """The last proposal is to stand still, and it has arrived before the process goes."""
        self._stand_still()
        self._twists.wait_for_all_acked(Duration(seconds=1))
        self._unload()

    def _stand_still(self) -> None:
        def last_word() -> None:
            if self._opening is not None:
                self._propose(np.zeros(3), np.zeros(3), self._opening, self.get_clock().now().to_msg())
            self._opening = None

        if self._inference is not None:
            self._inference.deactivate(last_word)

    def _unload(self) -> None:
        for subscription in self._inputs:
            self.destroy_subscription(subscription)
        self._inputs.clear()
        if self._inference is not None:
            self._inference.end(BUSY_LIMIT)
        self._inference = self._policy = None

    # ------------------------------------------------------------------ messages in

    def _subscribe(self) -> None:
        p = self._params.value
        image = CompressedImage if p.image_transport == "compressed" else Image
        inputs: list[tuple[str, Any, str, Any]] = []
        for entry in p.cameras:
            name, _, topic = entry.partition("=")
            inputs.append((f"image:{name}", image, topic, self._image_qos))
        if p.eef_pose_topic:
            inputs.append(("eef_pose", PoseStamped, p.eef_pose_topic, self._state_qos))
        if p.joint_states_topic:
            inputs.append(("joint_states", JointState, p.joint_states_topic, self._state_qos))
        self._sync = ApproximateSync([name for name, *_ in inputs], int(p.sync_slop * 1e9))
        for name, kind, topic, qos in inputs:
            self._inputs.append(
                self.create_subscription(kind, topic, lambda m, name=name: self._on_input(name, m), qos)
            )

    def _on_input(self, name: str, message: Any) -> None:
        matched = self._sync.add(name, stamp_ns(message.header.stamp), message)
        if matched is not None and self._inference is not None:
            self._inference.offer(matched, matched[0])

    def _on_instruction(self, message: String) -> None:
        self._instruction = message.data
        self.get_logger().info(f"instruction: {message.data}")
        if self._inference is not None:
            self._inference.reset(message.data)

    def _on_decision(self, message: DiagnosticArray) -> None:
        passed = all(entry.message == Verdict.PASSED.value for entry in message.status)
        if not passed and self._inference is not None:
            self._corrected += 1
            self._inference.forget()

    def _on_change(self, params: PolicyParameters) -> None:
        """Raises ConfigurationError: the policy does not take it."""
        before, policy, inference = self._params.value, self._policy, self._inference
        changes = {name: getattr(params, name) for name in TUNABLE if getattr(params, name) != getattr(before, name)}
        if not changes or policy is None or inference is None:
            return
        if not isinstance(policy, Tunable):
            raise ConfigurationError(f"policy '{params.policy}' cannot change {', '.join(changes)} while it acts")
        configure = policy.configure
        try:
            inference.ask(lambda: configure(**changes), BUSY_LIMIT)
        except (PolicyError, TimeoutError) as error:
            raise ConfigurationError(f"policy '{params.policy}' does not take {changes}: {error}") from error

    def _on_reset(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Starts an episode: on success, the policy has forgotten the last one and its commands are received."""
        lonely = [p.topic_name for p in (self._twists, self._grippers) if p and not p.get_subscription_count()]
        if self._inference is None or not self._inference.active:
            response.success, response.message = False, "not active"
        elif lonely:
            response.success, response.message = False, f"nobody receives {', '.join(lonely)}"
        elif not self._instruction:
            response.success, response.message = False, "no instruction yet"
        else:
            self._sync.clear()
            self._inference.reset(self._instruction)
            done = self._inference.wait_until_reset(BUSY_LIMIT)
            response.success = done and not self._inference.fault
            busy = "reset" if done else f"the policy has been busy for more than {BUSY_LIMIT} s"
            response.message = self._inference.fault or busy
        return response

    # ------------------------------------------------------------------ in the inference thread

    def _answer(self, work: tuple[int, dict[str, Any]]) -> None:
        policy, inference, p = self._policy, self._inference, self._params.value
        assert policy is not None
        assert inference is not None
        started = time.perf_counter()
        observation = self._observation(*work)
        acting = time.perf_counter()
        step = policy.act(observation)
        acted = time.perf_counter()
        action = check_action(step.action)
        linear, angular, opening = action_to_twist(action, policy.action_spec, p.max_opening)
        stamp = to_stamp(work[0])

        if not inference.while_valid(lambda: self._propose(linear, angular, opening, stamp)):
            return
        self._answered += 1
        self._latency.add(acted - started)
        stages = {"read": acting - started, "act": acted - acting, **step.timing}
        values = {**{f"{name}_ms": f"{seconds * 1e3:.3f}" for name, seconds in stages.items()}, **step.flags}
        if step.kept is not None:
            values["kept_tokens"] = len(step.kept)
        reused = bool(step.flags.get("reuse"))
        self._reused += reused
        if reason := step.flags.get("reuse_reason"):
            self._reasons[str(reason)] += 1
        self._steps.publish(
            status_array(stamp, status(self.get_name(), OK, "reused" if reused else "computed", values))
        )
        try:
            self._show(step, observation, linear / policy.action_spec.control_freq, work)
        except Exception as error:  # what cannot be drawn must not stop the robot
            self.get_logger().error(f"a step cannot be shown: {describe(error)}", throttle_duration_sec=5.0)

    def _propose(self, linear: np.ndarray, angular: np.ndarray, opening: float, stamp: Time) -> None:
        """linear: (3,) m/s; angular: (3,) rad/s; opening: m. Both halves, because a gate obeys no single one."""
        self._opening = opening
        if self._grippers is not None:
            self._grippers.publish(gripper_message(opening, stamp))
        self._twists.publish(twist_message(linear, angular, stamp, self._params.value.frame_id))

    def _show(
        self, step: ActionStep, observation: Observation, displacement: np.ndarray, work: tuple[int, dict[str, Any]]
    ) -> None:
        """displacement: (3,) m, commanded."""
        p, stamp = self._params.value, to_stamp(work[0])
        position, reused = observation.proprio.get("eef_pos"), bool(step.flags.get("reuse"))
        self._display.motion(displacement, reused, position, stamp, p.frame_id, p.markers)
        frames = {name: work[1][f"image:{name}"].header.frame_id for name in observation.images}
        self._display.overlay(step, observation, stamp, frames if p.overlay else {})

    def _observation(self, stamp: int, messages: dict[str, Any]) -> Observation:
        p, images, proprio = self._params.value, {}, {}
        for name, message in messages.items():
            kind, _, camera = name.partition(":")
            if kind == "image":
                read = read_compressed if isinstance(message, CompressedImage) else read_image
                images[camera] = read(message)
            elif kind == "eef_pose":
                proprio["eef_pos"], proprio["eef_quat"] = read_pose(message, p.frame_id)
            else:
                proprio["joint_pos"] = read_joints(message, p.arm_joints)
                proprio["gripper_qpos"] = read_joints(message, p.gripper_joints)
        return Observation(images=images, proprio=proprio, stamp=stamp * 1e-9)

    def _on_begin(self, pause: str) -> None:
        self._display.clear()
        if pause:
            self._pauses += 1
            self.get_logger().warning(f"the policy starts anew: {pause}", throttle_duration_sec=5.0)

    def _on_error(self, error: Exception) -> None:
        if isinstance(error, MessageError):
            self._refused += 1
            self.get_logger().warning(f"observation dropped: {error}", throttle_duration_sec=1.0)
        else:
            self.get_logger().error(describe(error))
            self._diagnostics.publish()

    # ------------------------------------------------------------------ report

    def _report(self) -> Report:
        inference = self._inference
        values = {
            "answered": self._answered,
            "reused": self._reused,
            **{f"reuse {reason.value}": count for reason in Reason if (count := self._reasons[reason])},
            "replaced": inference.replaced if inference else 0,
            "unmatched": self._sync.unmatched if inference else 0,
            "refused": self._refused,
            "corrected": self._corrected,
            "pauses": self._pauses,
            "instruction": self._instruction,
            **self._latency.summary("latency"),
        }
        if inference is None or self._policy is None or not inference.active:
            return (ERROR, self._load_error, values) if self._load_error else (STALE, "not active", values)
        if inference.fault:
            return ERROR, inference.fault, values
        if not self._instruction:
            return WARN, "waiting for an instruction", values
        if not self._answered:
            return WARN, "waiting for observations", values
        latency, period = self._latency.percentile_ms(50), 1e3 / self._policy.action_spec.control_freq
        if latency > period:
            return WARN, f"latency {latency:.1f} ms exceeds the control period {period:.1f} ms", values
        return OK, "acting", values


def main() -> int:
    def make() -> PolicyNode:
        node = PolicyNode()
        node.start()
        return node

    return run_node(make)


if __name__ == "__main__":
    sys.exit(main())
