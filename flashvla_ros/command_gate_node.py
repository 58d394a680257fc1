"""The command gate as a node: reads proposed commands, publishes what the robot may do, and the safe command last."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.duration import Duration
from rclpy.node import Node
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool
from std_srvs.srv import SetBool, Trigger

from flashvla_ros.diagnostics import ERROR, OK, WARN, Diagnostics, Report, Window, status, status_array, steady_timer
from flashvla_ros.errors import MessageError
from flashvla_ros.fields import param, require, require_positive
from flashvla_ros.gate import Command, CommandGate, Decision, GateLimits, State, Verdict
from flashvla_ros.messages import gripper_message, read_gripper, read_twist, stamp_ns, to_stamp, twist_message
from flashvla_ros.pairing import Pairing
from flashvla_ros.parameters import NodeParameters
from flashvla_ros.qos import parse_qos
from flashvla_ros.runner import run_node

ZERO = np.zeros(3)


@dataclass(frozen=True)
class GateParameters(GateLimits):
    proposed_twist_topic: str = param("policy/command", "twist proposed by the policy (geometry_msgs/TwistStamped)")
    proposed_gripper_topic: str = param(
        "policy/gripper_command",
        "gripper proposed by the policy (sensor_msgs/JointState, one position, m); empty = a robot without gripper, "
        "then the policy's gripper_topic too",
    )
    observation_topic: str = param("eef_pose", "heartbeat of the observations (geometry_msgs/PoseStamped)")
    estop_topic: str = param("estop", "emergency-stop button (std_msgs/Bool, true = pressed)")
    twist_topic: str = param("command", "what the robot executes (geometry_msgs/TwistStamped)")
    gripper_topic: str = param("gripper_command", "what the gripper executes (sensor_msgs/JointState, m)")
    frame_id: str = param("world", "frame of every twist; a command in another frame is dropped")
    command_qos: str = param("reliable depth=10", "QoS of the four command topics")
    observation_qos: str = param("reliable depth=10", "QoS of the heartbeat; use best_effort for a sensor that is")
    watchdog_rate: float = param(50.0, "Hz; how often the time-outs are looked at")
    start_enabled: bool = param(True, "false = silent until ~/enable is called with true")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "watchdog_rate")
        shortest = min(self.command_timeout, self.observation_timeout or self.command_timeout)
        require(
            self.watchdog_rate * shortest >= 5,
            "watchdog_rate",
            self.watchdog_rate,
            f"at least {5 / shortest:.1f} Hz, five looks within the shortest time-out ({shortest} s)",
        )


class CommandGateNode(Node):
    """Thin: `CommandGate` decides, this publishes. One thread."""

    def __init__(self) -> None:
        super().__init__("command_gate", automatically_declare_parameters_from_overrides=True)
        self._params = NodeParameters(self, GateParameters, self._on_change)
        p = self._params.value
        self.gate = CommandGate(p, enabled=p.start_enabled)
        self._pairing = Pairing()
        self._latency = Window()
        self._state = self.gate.state
        qos = parse_qos(p.command_qos, "command_qos")
        self._twists = self.create_publisher(TwistStamped, p.twist_topic, qos)
        self._grippers = self.create_publisher(JointState, p.gripper_topic, qos) if p.proposed_gripper_topic else None
        self._decisions = self.create_publisher(DiagnosticArray, "~/decision", qos)
        # First: when both wait, an executor serves an observation before the command that answers it.
        self.create_subscription(
            PoseStamped, p.observation_topic, self._on_observation, parse_qos(p.observation_qos, "observation_qos")
        )
        self.create_subscription(TwistStamped, p.proposed_twist_topic, self._on_twist, qos)
        if p.proposed_gripper_topic:
            self.create_subscription(JointState, p.proposed_gripper_topic, self._on_gripper, qos)
        self.create_subscription(Bool, p.estop_topic, self._on_estop, 10)
        self.create_service(SetBool, "~/enable", self._on_enable)
        self.create_service(Trigger, "~/estop", self._on_estop_service)
        self.create_service(Trigger, "~/reset", self._on_reset)
        self.create_service(Trigger, "~/ready", self._on_ready)
        self._diagnostics = Diagnostics(self, self._report)
        steady_timer(self, 1.0 / p.watchdog_rate, self._tick)

    # ------------------------------------------------------------------ inputs

    def _on_change(self, params: GateParameters) -> None:
        self.gate.limits = params

    def _on_observation(self, _message: PoseStamped) -> None:
        self.gate.observed(time.monotonic())

    def _on_estop(self, message: Bool) -> None:
        self.gate.press_estop(message.data, time.monotonic())
        self._tick()

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self.gate.enable(request.data, time.monotonic())
        self._tick()
        response.success = self.gate.state is not State.LATCHED
        response.message = f"{self.gate.state.value}: {self.gate.reason}"
        return response

    def _on_estop_service(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self.gate.latch("emergency stop called", time.monotonic())
        self._tick()
        response.success, response.message = True, "stopped and latched; call ~/reset to go on"
        return response

    def _on_reset(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.success, response.message = self.gate.reset(time.monotonic())
        self._announce_state()
        return response

    def _on_ready(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Whether somebody receives what the gate sends: before that, a command would be lost without a word."""
        lonely = [p.topic_name for p in (self._twists, self._grippers) if p and not p.get_subscription_count()]
        response.success = not lonely
        response.message = f"nobody receives {', '.join(lonely)}" if lonely else "connected"
        return response

    # ------------------------------------------------------------------ commands

    def _on_twist(self, message: TwistStamped) -> None:
        if self._grippers is None:
            self._decide(stamp_ns(message.header.stamp), message, None)
        else:
            self._half(stamp_ns(message.header.stamp), "twist", message)

    def _on_gripper(self, message: JointState) -> None:
        self._half(stamp_ns(message.header.stamp), "gripper", message)

    def _half(self, stamp: int, kind: str, message: object) -> None:
        command = self._pairing.add(stamp, kind, message)
        if command is not None:
            self._decide(stamp, command["twist"], command["gripper"])
        for lone, half in self._pairing.abandoned():
            self._publish_decision(lone, self.gate.refuse(f"incomplete: only a {half} message came"), 0.0)

    def _decide(self, stamp: int, twist: TwistStamped, gripper: JointState | None) -> None:
        start = time.perf_counter()
        now, mono = self.get_clock().now().nanoseconds, time.monotonic()
        try:
            if twist.header.frame_id != self._params.value.frame_id:
                raise MessageError(f"wrong frame: '{twist.header.frame_id}', not '{self._params.value.frame_id}'")
            opening = read_gripper(gripper) if gripper is not None else None
        except MessageError as error:
            decision = self.gate.refuse(str(error))
        else:
            decision = self.gate.submit(Command(*read_twist(twist), opening, stamp), now, mono)
        if decision.command is not None:
            self._send(decision.command)
        seconds = time.perf_counter() - start
        self._latency.add(seconds)
        self._publish_decision(stamp, decision, seconds)
        if decision.verdict is Verdict.REJECTED:
            self._tick()
        self._announce_state()

    def _send(self, command: Command) -> None:
        stamp = to_stamp(command.stamp_ns)
        if self._grippers is not None and command.opening is not None:
            self._grippers.publish(gripper_message(command.opening, stamp))
        self._twists.publish(twist_message(command.linear, command.angular, stamp, self._params.value.frame_id))

    def _publish_decision(self, stamp: int, decision: Decision, seconds: float) -> None:
        level = {Verdict.PASSED: OK, Verdict.CLAMPED: WARN, Verdict.DROPPED: WARN, Verdict.REJECTED: ERROR}
        values = {"reason": decision.reason, "gate_ms": f"{seconds * 1e3:.3f}"}
        self._decisions.publish(
            status_array(
                to_stamp(stamp), status(self.get_name(), level[decision.verdict], decision.verdict.value, values)
            )
        )
        if decision.verdict is not Verdict.PASSED:
            self.get_logger().warning(f"{decision.verdict.value}: {decision.reason}", throttle_duration_sec=1.0)

    # ------------------------------------------------------------------ time and end

    def _tick(self) -> None:
        stop = self.gate.tick(self.get_clock().now().nanoseconds, time.monotonic())
        if stop is not None:
            self._send_stop()
            if stop.first:
                self.get_logger().error(f"stopping the robot: {stop.reason}")
        self._announce_state()

    def _send_stop(self) -> None:
        stamp = self.get_clock().now().to_msg()
        self._twists.publish(twist_message(ZERO, ZERO, stamp, self._params.value.frame_id))

    def _announce_state(self) -> None:
        if self.gate.state is not self._state:
            self._state = self.gate.state
            self._diagnostics.publish()

    def _report(self) -> Report:
        gate = self.gate
        level = {State.ACTIVE: OK, State.LATCHED: ERROR}.get(gate.state, WARN)
        values = {
            "state": gate.state.value,
            **gate.counts,
            **{f"reason {k}": v for k, v in gate.reasons.items()},
            **self._latency.summary("gate"),
        }
        refused = f"; last command refused: {gate.last_refusal}" if gate.last_refusal else ""
        return level, f"{gate.state.value}: {gate.reason}{refused}", values

    def close(self) -> None:
        """The robot gets the safe command last, and it has arrived before the process goes."""
        if self.gate.state in (State.ACTIVE, State.STOPPING):
            self._send_stop()
            self.get_logger().info("sent the safe command: the gate ends")
        self._twists.wait_for_all_acked(Duration(seconds=1))


def main() -> int:
    return run_node(CommandGateNode)


if __name__ == "__main__":
    sys.exit(main())
