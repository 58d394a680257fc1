"""The gate as a real process on real Fast DDS."""

from __future__ import annotations

import signal
import time

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, TwistStamped
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool
from std_srvs.srv import SetBool, Trigger

from flashvla_ros.diagnostics import values_of
from flashvla_ros.messages import gripper_message, read_twist, stamp_ns, twist_message

FAST = {
    "stop_duration": 0.05,
    "cooldown": 0.2,
    "command_timeout": 0.4,
    "observation_timeout": 0.0,
    "start_enabled": True,
}


class Robot:
    """The gate's surroundings: proposes commands like a policy, hears what a robot would."""

    def __init__(self, ros, nodes, **parameters) -> None:
        self.ros = ros
        self.group = nodes.start("robot", only=("command_gate",), command_gate={**FAST, **parameters})
        self.twists = ros.listen(TwistStamped, "/command")
        self.grippers = ros.listen(JointState, "/gripper_command")
        self.decisions = ros.listen(DiagnosticArray, "/command_gate/decision")
        self.diagnostics = ros.listen(DiagnosticArray, "/diagnostics")
        node = ros.node
        self._twist = node.create_publisher(TwistStamped, "/policy/command", 10)
        self._gripper = node.create_publisher(JointState, "/policy/gripper_command", 10)
        self.poses = node.create_publisher(PoseStamped, "/eef_pose", 10)
        for publisher in (self._twist, self._gripper, self.poses):
            ros.connected(publisher)
        for topic in ("/command", "/gripper_command", "/command_gate/decision"):
            ros.wait(lambda topic=topic: node.count_publishers(topic))
        self._wait_for_an_answer()

    def _wait_for_an_answer(self):
        """That a publisher is there does not say that it has found us: asks with commands too old to be obeyed."""
        stamp, again = 0, 0.0

        def answered():
            nonlocal stamp, again
            if time.monotonic() > again:
                stamp, again = self.propose(age=3600), time.monotonic() + 0.5
            return any(
                stamp_ns(m.header.stamp) == stamp and not values_of(m.status[0])["reason"].startswith("incomplete")
                for m in self.decisions
            )

        self.ros.wait(answered, what="for the gate to hear and to be heard")
        self.decisions.clear()

    def propose(self, linear=(0.1, 0, 0), angular=(0, 0, 0), opening=0.04, frame="world", age=0.0):
        stamp = self.ros.node.get_clock().now().to_msg()
        stamp.sec -= int(age)
        self._gripper.publish(gripper_message(opening, stamp))
        self._twist.publish(twist_message(np.array(linear, float), np.array(angular, float), stamp, frame))
        return stamp_ns(stamp)

    def decision(self, count=1):
        self.ros.wait(lambda: len(self.decisions) >= count, what="for a decision")
        entry = self.decisions[count - 1].status[0]
        return entry.message, values_of(entry)["reason"]


def is_zero(message: TwistStamped) -> bool:
    return not np.any(read_twist(message))


def test_command_passes_unchanged_with_its_stamp(ros, nodes):
    robot = Robot(ros, nodes)
    stamp = robot.propose(linear=(0.1, 0.05, -0.02), angular=(0.2, 0, 0.1))
    ros.wait(lambda: robot.twists and robot.grippers)
    linear, angular = read_twist(robot.twists[0])
    assert (linear.tolist(), angular.tolist()) == ([0.1, 0.05, -0.02], [0.2, 0, 0.1])
    assert stamp_ns(robot.twists[0].header.stamp) == stamp == stamp_ns(robot.grippers[0].header.stamp)
    assert robot.decision()[0] == "passed"


def test_silence_of_the_policy_leads_to_a_zero_twist_and_then_silence(ros, nodes):
    robot = Robot(ros, nodes)
    start = time.monotonic()
    robot.propose()
    ros.wait(lambda: robot.twists and is_zero(robot.twists[-1]))
    assert time.monotonic() - start >= FAST["command_timeout"]
    assert not is_zero(robot.twists[0])
    ros.wait(lambda: any(m.status[0].message.startswith("idle: no command") for m in robot.diagnostics))
    count = len(robot.twists)
    robot.propose(linear=(0.2, 0, 0))  # the sentinel: what comes next is this, so nothing was published before it
    ros.wait(lambda: len(robot.twists) > count)
    assert read_twist(robot.twists[count])[0][0] == 0.2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_sends_the_safe_command_last_and_ends_with_status_0(ros, nodes, number):
    robot = Robot(ros, nodes, command_timeout=5.0)
    robot.propose()
    ros.wait(lambda: robot.twists)
    process = robot.group.processes["command_gate"]
    process.send_signal(number)
    ros.wait(lambda: process.poll() is not None)
    ros.drain()
    assert process.returncode == 0
    assert is_zero(robot.twists[-1])
    assert not is_zero(robot.twists[-2])


def test_nan_is_dropped_with_a_reason_and_the_next_command_passes(ros, nodes):
    robot = Robot(ros, nodes)
    robot.propose(linear=(np.nan, 0, 0))
    assert robot.decision(1) == ("dropped", "not finite: the twist has NaN or infinity")
    stamp = robot.propose()
    assert robot.decision(2)[0] == "passed"
    ros.wait(lambda: robot.twists)
    assert stamp_ns(robot.twists[0].header.stamp) == stamp


def test_stale_and_future_stamps_are_dropped(ros, nodes):
    robot = Robot(ros, nodes)
    robot.propose(age=10)
    assert robot.decision(1)[1].startswith("stale")
    robot.propose(age=-10)
    assert robot.decision(2)[1].startswith("future")


def test_wrong_frame_is_dropped_by_name(ros, nodes):
    robot = Robot(ros, nodes)
    robot.propose(frame="camera")
    assert robot.decision() == ("dropped", "wrong frame: 'camera', not 'world'")


def test_gross_excess_latches_until_reset(ros, nodes):
    robot = Robot(ros, nodes)
    robot.propose(linear=(50, 0, 0))
    assert robot.decision(1)[0] == "rejected"
    ros.wait(lambda: robot.twists and is_zero(robot.twists[-1]))
    robot.propose()
    assert robot.decision(2)[1].startswith("latched")
    ros.wait(lambda: ros.call(Trigger, "/command_gate/reset", Trigger.Request()).success)
    robot.propose()
    assert robot.decision(3)[0] == "passed"


def test_emergency_stop_topic_and_service_stop_the_robot(ros, nodes):
    robot = Robot(ros, nodes)
    robot.propose()
    ros.wait(lambda: robot.twists)
    button = ros.node.create_publisher(Bool, "/estop", 10)
    ros.connected(button)
    button.publish(Bool(data=True))
    ros.wait(lambda: is_zero(robot.twists[-1]))
    refused = ros.call(Trigger, "/command_gate/reset", Trigger.Request())
    assert not refused.success
    assert "still pressed" in refused.message
    button.publish(Bool(data=False))
    ros.wait(lambda: ros.call(Trigger, "/command_gate/reset", Trigger.Request()).success)
    assert ros.call(Trigger, "/command_gate/estop", Trigger.Request()).success
    robot.propose()
    assert robot.decision(2)[1].startswith("latched: emergency stop called")


def test_silent_until_enabled(ros, nodes):
    robot = Robot(ros, nodes, start_enabled=False)
    robot.propose()
    assert robot.decision(1)[1].startswith("disabled")
    assert ros.call(SetBool, "/command_gate/enable", SetBool.Request(data=True)).success
    robot.propose()
    assert robot.decision(2)[0] == "passed"
    assert len(robot.twists) <= 1


def test_observations_falling_silent_stop_the_robot(ros, nodes):
    robot = Robot(ros, nodes, observation_timeout=0.5, command_timeout=30.0)
    robot.propose()
    assert robot.decision(1)[1].startswith("no observation")
    robot.poses.publish(PoseStamped())

    def passed() -> bool:
        robot.poses.publish(PoseStamped())
        robot.propose()
        ros.drain()
        return bool(robot.twists)

    ros.wait(passed)
    ros.wait(lambda: is_zero(robot.twists[-1]), what="for the stop after the poses ended")


def test_limits_change_at_run_time_and_wrong_ones_are_refused(ros, nodes):
    robot = Robot(ros, nodes)

    def set_limit(value):
        request = SetParameters.Request(parameters=[Parameter("max_translation", value=value).to_parameter_msg()])
        return ros.call(SetParameters, "/command_gate/set_parameters", request).results[0]

    refused = set_limit(-1.0)
    assert not refused.successful
    assert "max_translation" in refused.reason
    assert set_limit(0.001).successful
    robot.propose(linear=(0.025, 0, 0))  # 1.25 mm a period
    assert robot.decision()[0] == "clamped"


@pytest.mark.parametrize(
    ("parameter", "value", "said"),
    [
        ("max_translation", -0.1, "max_translation"),
        ("watchdog_rate", 1.0, "watchdog_rate"),
        ("max_tranlation", 0.1, "max_tranlation"),
        ("command_qos", "relaible", "relaible"),
        ("period", "fast", "period"),
    ],
)
def test_wrong_parameter_ends_the_node_with_status_2_naming_it(nodes, parameter, value, said):
    group = nodes.start("robot", only=("command_gate",), command_gate={parameter: value})
    assert group.processes["command_gate"].wait(30) == 2
    group.stop()
    assert said in nodes.output()
    assert "Traceback" not in nodes.output()
