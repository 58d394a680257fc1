"""The policy node as a real process, with policies of a third party found through their entry point."""

from __future__ import annotations

import json
import signal
import threading

import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, TwistStamped
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.srv import SetParameters
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger

from flashvla_ros.diagnostics import ERROR, values_of
from flashvla_ros.messages import compressed_message, image_message, pose_message, read_twist, stamp_ns, to_stamp
from flashvla_ros.policy_node import PolicyNode
from flashvla_ros.qos import LATCHED

THIRD_PARTY = '''
import numpy as np
from mllm.policy import ActionSpec, ActionStep

class Mean:
    """Answers the mean brightness of the image, and the number of steps since its reset."""
    action_spec = ActionSpec()
    def __init__(self, fail_on=None): self.fail_on = fail_on
    def reset(self, instruction): self.steps, self.instruction = 0, instruction
    def act(self, observation):
        self.steps += 1
        if self.steps == self.fail_on:
            raise RuntimeError("the third party's bug")
        image = observation.images["front"]
        action = np.array([image[0, 0, 0] / 255, self.steps / 100, 0, 0, 0, 0, -1], np.float32)
        return ActionStep(action, flags={"instruction": self.instruction})

class Wrong(Mean):
    def act(self, observation): return ActionStep(np.full(7, np.nan, np.float32))

class OtherFrame(Mean):
    action_spec = ActionSpec(frame="tool0")
'''


@pytest.fixture
def third_party(install):
    install(THIRD_PARTY, mean="Mean", wrong="Wrong", other_frame="OtherFrame")


class Camera:
    """The policy's surroundings: publishes images, hears proposals."""

    def __init__(self, ros, nodes, policy="mean", options=None, **parameters) -> None:
        self.ros = ros
        parameters = {
            "cameras": ["front=image_raw"],
            "policy": policy,
            "policy_options": json.dumps(options or {}),
            "image_qos": "reliable depth=10",
            **parameters,
        }
        self.group = nodes.start("robot", only=("policy",), policy=parameters)
        self.twists = ros.listen(TwistStamped, "/policy/command")
        self.grippers = ros.listen(JointState, "/policy/gripper_command")
        self.steps = ros.listen(DiagnosticArray, "/policy/step")
        self.diagnostics = ros.listen(DiagnosticArray, "/diagnostics")
        self.images = ros.node.create_publisher(Image, "/image_raw", 10)
        self.instructions = ros.node.create_publisher(String, "/instruction", LATCHED)

    def ready(self, instruction="stack the cubes", topics=("command", "gripper_command", "step")):
        self.ros.connected(self.images)
        for topic in (f"/policy/{name}" for name in topics):
            self.ros.wait(lambda topic=topic: self.ros.node.count_publishers(topic))
        if instruction:
            self.instructions.publish(String(data=instruction))
            self.ros.wait(lambda: self.ros.call(Trigger, "/policy/reset", Trigger.Request()).success)
        return self

    def show(self, brightness=255, message=None):
        if message is None:
            stamp = self.ros.node.get_clock().now().to_msg()
            message = image_message(np.full((4, 4, 3), brightness, np.uint8), stamp, "front")
        self.images.publish(message)
        return stamp_ns(message.header.stamp)

    def answered(self, count):
        self.ros.wait(lambda: len(self.twists) >= count and len(self.grippers) >= count, what=f"for answer {count}")
        return read_twist(self.twists[count - 1])[0]

    def done(self, count):
        """What was done in the first `count` steps: c where the policy computed, r where its last action was reused."""
        while len(self.steps) < count:
            before = len(self.steps)
            self.show(brightness=0)
            self.ros.wait(lambda before=before: len(self.steps) > before)
        return "".join(m.status[0].message[0] for m in self.steps[:count])

    def set(self, **parameters):
        """Sets parameters of the policy; returns whether it took the last one, and why not."""
        values = [Parameter(name, value=value).to_parameter_msg() for name, value in parameters.items()]
        result = self.ros.call(SetParameters, "/policy/set_parameters", SetParameters.Request(parameters=values))
        return result.results[-1].successful, result.results[-1].reason

    def counted(self, name, value):
        self.ros.wait(
            lambda: self.diagnostics and values_of(self.diagnostics[-1].status[0]).get(name) == str(value),
            what=f"for {name} {value}",
        )

    def reported(self, text):
        return self.ros.wait(lambda: [m for m in self.diagnostics if text in m.status[0].message], what=f"for {text!r}")


def change_state(ros, transition):
    request = ChangeState.Request(transition=Transition(id=transition))
    return ros.call(ChangeState, "/policy/change_state", request).success


def start_gate(ros, nodes, topics=("command", "gripper_command"), **parameters):
    """A real gate behind the policy, which no silence stops."""
    patient = {"start_enabled": True, "observation_timeout": 0.0, "command_timeout": 30.0, "max_observation_age": 30.0}
    nodes.start("robot", only=("command_gate",), command_gate={**patient, **parameters})
    for topic in (f"/policy/{name}" for name in topics):
        ros.wait(lambda topic=topic: ros.node.count_subscribers(topic) >= 2)


def test_command_answers_the_image_and_carries_its_stamp(ros, nodes, third_party):
    camera = Camera(ros, nodes).ready()
    stamp = camera.show(brightness=51)
    linear = camera.answered(1)
    np.testing.assert_allclose(linear, [0.2, 0.01, 0], rtol=1e-6)
    assert stamp_ns(camera.twists[0].header.stamp) == stamp == stamp_ns(camera.grippers[0].header.stamp)
    ros.wait(lambda: camera.steps)
    assert values_of(camera.steps[0].status[0])["instruction"] == "stack the cubes"


def test_nothing_is_commanded_before_an_instruction(ros, nodes, third_party):
    camera = Camera(ros, nodes).ready(instruction="")
    camera.show()
    camera.show()
    camera.counted("replaced", 1)  # both have arrived, and nothing looked at the first
    camera.reported("waiting for an instruction")
    camera.ready()
    stamp = camera.show(brightness=0)
    camera.answered(1)
    assert stamp_ns(camera.twists[0].header.stamp) == stamp  # the first command answers the third image


def test_new_instruction_resets_the_policy(ros, nodes, third_party):
    camera = Camera(ros, nodes).ready()
    camera.show()
    camera.answered(1)
    camera.show()
    assert camera.answered(2)[1] == pytest.approx(0.02)
    camera.ready("open the drawer")
    camera.show()
    assert camera.answered(3)[1] == pytest.approx(0.01)


def test_after_a_pause_the_policy_starts_anew_and_the_node_says_so(ros, nodes, third_party):
    camera = Camera(ros, nodes, max_pause=2.0).ready()
    start = stamp_ns(ros.node.get_clock().now().to_msg())
    sideways = []
    for count, seconds in enumerate((0.0, 2.0, 4.1, 4.2), 1):
        stamp = to_stamp(start + int(seconds * 1e9))
        camera.show(message=image_message(np.zeros((4, 4, 3), np.uint8), stamp, "front"))
        sideways.append(camera.answered(count)[1])
    assert sideways == pytest.approx([0.01, 0.02, 0.01, 0.02])
    camera.counted("pauses", 1)
    assert "the policy starts anew: no observation was answered for 2.100 s" in nodes.output()


def test_lifecycle_transitions_start_and_stop_commands_and_the_last_one_is_zero(ros, nodes, third_party):
    camera = Camera(ros, nodes, autostart=False)
    assert change_state(ros, Transition.TRANSITION_CONFIGURE)
    inactive = ros.call(Trigger, "/policy/reset", Trigger.Request())
    assert (inactive.success, inactive.message) == (False, "not active")
    assert change_state(ros, Transition.TRANSITION_ACTIVATE)
    camera.ready()
    camera.show()
    camera.answered(1)
    assert change_state(ros, Transition.TRANSITION_DEACTIVATE)
    ros.wait(lambda: len(camera.twists) == 2)
    camera.show()
    assert change_state(ros, Transition.TRANSITION_ACTIVATE)
    stamp = camera.show(brightness=0)
    ros.wait(lambda: len(camera.twists) == 3)
    assert not np.any(read_twist(camera.twists[1]))
    assert read_twist(camera.twists[2])[0][1] == pytest.approx(0.01)  # the first step since a reset
    assert stamp_ns(camera.twists[2].header.stamp) == stamp  # the image shown while inactive was not answered
    assert change_state(ros, Transition.TRANSITION_DEACTIVATE)
    assert change_state(ros, Transition.TRANSITION_CLEANUP)
    assert change_state(ros, Transition.TRANSITION_CONFIGURE)


def test_sigterm_proposes_to_stand_still_last_and_ends_with_status_0(ros, nodes, third_party):
    camera = Camera(ros, nodes).ready()
    camera.show()
    camera.answered(1)
    process = camera.group.processes["policy"]
    process.send_signal(signal.SIGTERM)
    ros.wait(lambda: process.poll() is not None)
    ros.drain()
    assert process.returncode == 0
    assert not np.any(read_twist(camera.twists[-1]))


@pytest.mark.parametrize("end", ["deactivate", "sigterm"])
def test_the_last_command_stands_still_at_once_behind_the_gate_too(ros, nodes, third_party, end):
    camera = Camera(ros, nodes)
    commands, grippers = ros.listen(TwistStamped, "/command"), ros.listen(JointState, "/gripper_command")
    start_gate(ros, nodes, max_translation=10.0, max_linear_speed=1000.0)
    camera.ready()

    def moves() -> bool:
        camera.show(brightness=10)
        ros.drain()
        return bool(commands and grippers)

    ros.wait(moves)
    ros.drain()
    assert np.any(read_twist(commands[-1]))
    if end == "deactivate":
        assert change_state(ros, Transition.TRANSITION_DEACTIVATE)
    else:
        camera.group.processes["policy"].send_signal(signal.SIGTERM)
    ros.wait(lambda: not np.any(read_twist(commands[-1])), 10, "for the stop")
    ros.wait(lambda: camera.grippers[-1].header.stamp == camera.twists[-1].header.stamp)
    assert camera.grippers[-1].position == camera.grippers[0].position


def test_a_robot_without_gripper_is_reset_commanded_and_stopped(ros, nodes, third_party):
    camera = Camera(ros, nodes, gripper_topic="")
    commands = ros.listen(TwistStamped, "/command")
    start_gate(ros, nodes, ["command"], proposed_gripper_topic="", max_translation=10.0, max_linear_speed=1e3)
    camera.ready(topics=["command", "step"])

    def moves() -> bool:
        camera.show(brightness=10)
        ros.drain()
        return bool(commands)

    ros.wait(moves)
    assert np.any(read_twist(commands[-1]))
    assert change_state(ros, Transition.TRANSITION_DEACTIVATE)
    ros.wait(lambda: not np.any(read_twist(commands[-1])), 10, "for the stop")
    assert not ros.node.count_publishers("/policy/gripper_command")


def test_a_policy_that_commanded_nothing_has_no_last_word(ros, nodes, third_party):
    camera = Camera(ros, nodes).ready()
    for transition in (Transition.TRANSITION_DEACTIVATE, Transition.TRANSITION_ACTIVATE):
        assert change_state(ros, transition)
    stamp = camera.show()
    camera.answered(1)
    assert stamp_ns(camera.twists[0].header.stamp) == stamp


def test_error_of_the_policy_stops_commands_until_a_reset(ros, nodes, third_party):
    camera = Camera(ros, nodes, options={"fail_on": 2}).ready()
    camera.show()
    camera.answered(1)
    camera.show()
    message = camera.reported("policy failed: RuntimeError: the third party's bug")[0]
    assert message.status[0].level == ERROR
    camera.show()
    camera.show()
    camera.counted("replaced", 1)  # both have arrived
    camera.ready()
    stamp = camera.show()
    camera.answered(2)
    assert stamp_ns(camera.twists[1].header.stamp) == stamp
    assert "Traceback" in nodes.output()


def test_nan_action_is_the_policys_error_and_is_not_sent(ros, nodes, third_party):
    camera = Camera(ros, nodes, policy="wrong").ready()
    camera.show()
    camera.reported("action[0] is nan")
    assert not camera.twists


def test_unusable_images_are_refused_and_counted_and_the_next_is_answered(ros, nodes, third_party):
    camera = Camera(ros, nodes).ready()
    camera.reported("waiting for observations")
    for count, spoil in enumerate(({"encoding": "16UC1"}, {"step": 3}, {"height": 400}), 1):
        message = image_message(np.zeros((4, 4, 3), np.uint8), ros.node.get_clock().now().to_msg(), "front")
        for name, value in spoil.items():
            setattr(message, name, value)
        camera.show(message=message)
        ros.wait(lambda count=count: values_of(camera.diagnostics[-1].status[0])["refused"] == str(count))
    stamp = camera.show()
    camera.answered(1)
    assert stamp_ns(camera.twists[0].header.stamp) == stamp


def test_states_that_are_not_finite_or_in_another_frame_are_refused_and_the_next_are_answered(ros, nodes, third_party):
    camera = Camera(ros, nodes, eef_pose_topic="eef_pose", joint_states_topic="joint_states")
    poses = ros.node.create_publisher(PoseStamped, "/eef_pose", 10)
    joints = ros.node.create_publisher(JointState, "/joint_states", 10)
    ros.connected(poses)
    ros.connected(joints)
    camera.ready()
    names = [*(f"panda_joint{i}" for i in range(1, 8)), "panda_finger_joint1", "panda_finger_joint2"]

    def observe(x=0.4, finger=0.04, frame="world"):
        stamp = ros.node.get_clock().now().to_msg()
        message = JointState(name=names, position=[0.1] * 7 + [finger] * 2)
        message.header.stamp = stamp
        poses.publish(pose_message(np.array([x, 0, 0.9]), np.array([0, 0, 0, 1]), stamp, frame))
        joints.publish(message)
        return camera.show(message=image_message(np.zeros((4, 4, 3), np.uint8), stamp, "front"))

    for count, spoil in enumerate(({"x": np.nan}, {"finger": np.inf}, {"frame": "base_link"}), 1):
        observe(**spoil)
        camera.counted("refused", count)
    assert "publish it in 'world'" in nodes.output()
    stamp = observe()
    camera.answered(1)
    assert stamp_ns(camera.twists[0].header.stamp) == stamp


def test_padded_rows_are_read_right(ros, nodes, third_party):
    camera = Camera(ros, nodes).ready()
    message = image_message(np.full((4, 4, 3), 102, np.uint8), ros.node.get_clock().now().to_msg(), "front")
    rows = np.zeros((4, 20), np.uint8)
    rows[:, :12] = 102
    message.step, message.data = 20, rows.tobytes()
    camera.show(message=message)
    assert camera.answered(1)[0] == pytest.approx(0.4)


def test_compressed_images(ros, nodes, third_party):
    from sensor_msgs.msg import CompressedImage

    camera = Camera(ros, nodes, image_transport="compressed", cameras=["front=image_raw/compressed"])
    camera.images = ros.node.create_publisher(CompressedImage, "/image_raw/compressed", 10)
    camera.ready()
    stamp = ros.node.get_clock().now().to_msg()
    camera.show(message=compressed_message(np.full((16, 16, 3), 128, np.uint8), stamp, "front", 95))
    assert camera.answered(1)[0] == pytest.approx(128 / 255, abs=0.02)


def test_only_the_newest_of_many_images_is_answered_last(ros, nodes, third_party):
    camera = Camera(ros, nodes).ready()
    last = [camera.show(brightness=b) for b in range(100)][-1]
    ros.wait(lambda: camera.twists and stamp_ns(camera.twists[-1].header.stamp) == last)
    stamps = [stamp_ns(m.header.stamp) for m in camera.twists]
    assert stamps == sorted(set(stamps))


def test_reuse_is_a_parameter_that_holds_from_the_next_frame_on(ros, nodes, third_party):
    camera = Camera(ros, nodes).ready()
    assert camera.done(3) == "ccc"
    assert camera.set(reuse="paper") == (True, "")
    assert camera.done(6) == "cccccr"
    successful, reason = camera.set(reuse="sometimes")
    assert not successful
    assert "choose one of off, paper, gated" in reason
    assert camera.done(9) == "cccccrccr"
    assert camera.set(reuse=False) == (True, "")  # what `ros2 param set` makes of off
    assert camera.done(12) == "cccccrccrccc"
    values = values_of(camera.steps[8].status[0])
    assert values["reuse_reason"] == "reused"
    assert float(values["reuse_ms"]) > 0
    camera.counted("reused", 2)
    assert values_of(camera.diagnostics[-1].status[0])["reuse computed-cap"] == "2"


def test_a_policy_that_keeps_all_tokens_refuses_another_number(ros, nodes, third_party):
    camera = Camera(ros, nodes).ready()
    successful, reason = camera.set(compress="flashvla")
    assert not successful
    assert "cannot change compress" in reason
    assert camera.done(1) == "c"


def test_reuse_may_also_be_an_option_of_the_policy(ros, nodes, third_party):
    camera = Camera(ros, nodes, options={"reuse": {"mode": "gated", "max_consecutive": 2}}).ready()
    assert camera.done(6) == "ccrrcc"


def test_after_a_new_instruction_or_a_reset_nothing_is_reused(ros, nodes, third_party):
    camera = Camera(ros, nodes, reuse="paper").ready()
    assert camera.done(5) == "ccrcc"
    camera.ready("open the drawer")
    assert camera.done(8) == "ccrccccr"
    values = values_of(camera.steps[5].status[0])
    assert (values["instruction"], values["reuse_reason"]) == ("open the drawer", "computed-first-steps")


def test_after_a_command_that_the_gate_clamped_nothing_is_reused(ros, nodes, third_party):
    camera = Camera(ros, nodes, reuse="paper")
    # The n-th action of this policy that was not reused is 0.5 n mm long: the fourth is the first over the limit.
    decisions = ros.listen(DiagnosticArray, "/command_gate/decision")
    start_gate(ros, nodes, max_translation=0.0019, max_linear_speed=100.0)
    ros.wait(lambda: ros.node.count_subscribers("/command_gate/decision") >= 2)
    camera.ready()

    def corrected() -> list[int]:
        told = [values_of(message.status[0]).get("corrected") for message in camera.diagnostics]
        return [int(count) for count in told if count]

    def heard() -> bool:
        # The gate drops what answers an image of an hour ago, and says so; "incomplete" is what came by half.
        stamp = to_stamp(stamp_ns(ros.node.get_clock().now().to_msg()) - 3600 * 10**9)
        camera.show(message=image_message(np.zeros((4, 4, 3), np.uint8), stamp, "front"))
        ros.drain()
        reasons = [values_of(message.status[0])["reason"] for message in decisions]
        return bool(any(not reason.startswith("incomplete") for reason in reasons) and sum(corrected()))

    ros.wait(heard, what="for the gate, by the policy and by this test")
    told = len(corrected())
    ros.wait(lambda: len(corrected()) >= told + 2)
    before = corrected()[-1]
    decisions.clear()
    camera.steps.clear()
    assert camera.done(5) == "ccrcc"  # from the first steps on, because stamps have jumped
    ros.wait(lambda: len(decisions) == 5)
    assert [message.status[0].message for message in decisions] == ["passed"] * 4 + ["clamped"]
    camera.counted("corrected", before + 1)
    assert camera.done(6) == "ccrccc"  # without the clamp it would be reused here


def test_a_configuration_that_failed_leaves_no_thread_and_no_subscription(ros_environment):
    rclpy.init(args=["--ros-args", "-p", 'cameras:=["front=image_raw", "side=bad topic"]', "-p", "autostart:=false"])
    try:
        node = PolicyNode()
        for _ in range(2):
            assert node.trigger_configure() is TransitionCallbackReturn.FAILURE
            assert "inference" not in {thread.name for thread in threading.enumerate()}
            assert not node.count_subscribers("image_raw")
        node.destroy_node()
    finally:
        rclpy.shutdown()


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        (
            {"policy": "nope"},
            "no policy is called 'nope', and there is no folder nope; installed: blind, hold, mean, mini, mini-ar, "
            "misled, other_frame, replay, wrong",
        ),
        ({"policy": "mean", "policy_options": '{"colour": 1}'}, "colour"),
        ({"policy": "mean", "policy_options": "{"}, "policy_options"),
        ({"policy": "other_frame"}, "frame 'tool0'"),
        ({"policy": "replay", "policy_options": '{"episode": "/nowhere.safetensors"}'}, "/nowhere.safetensors"),
        ({"cameras": ["front"]}, "NAME=TOPIC"),
        ({"cameras": ["front=image_raw", "side=bad topic"]}, "'bad topic'"),
        ({"image_transport": "smoke"}, "image_transport"),
        ({"reuse": "sometimes"}, "choose one of off, paper, gated"),
    ],
)
def test_wrong_configuration_ends_the_node_with_status_2_naming_it(nodes, third_party, parameters, said):
    group = nodes.start("robot", only=("policy",), policy=parameters)
    assert group.processes["policy"].wait(30) == 2
    group.stop()
    assert said in nodes.output()
    assert "Traceback" not in nodes.output()
