"""What the policy node shows: overlays and markers, with the stamps of the observations that they are about."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import TwistStamped
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from visualization_msgs.msg import Marker, MarkerArray

from flashvla_ros.display import Display, topic_of
from flashvla_ros.messages import read_image, stamp_ns, to_stamp
from flashvla_ros.motion import COMPUTED, REUSED, Motion, marker_array
from flashvla_ros.paths import config_file, share_directory
from flashvla_ros.qos import LATCHED
from flashvla_ros.recorder import Video
from mllm import overlay
from mllm.policy import ActionStep, Observation

SOURCE = """
import numpy as np
from mllm.policy import ActionSpec, ActionStep, TokenLayout

class Looker:
    action_spec = ActionSpec()
    layout = TokenLayout(("front",), 2, 2)
    def __init__(self, kept=(0, 3)): self.kept = np.array(kept)
    def reset(self, instruction): pass
    def act(self, observation):
        action = np.array([0.5, 0, -0.25, 0, 0, 0, -1], np.float32)
        return ActionStep(action, kept=self.kept, merged=np.array([[1, 3]]))
"""
STEP = np.array([0.025, 0, -0.0125])  # m, of that action


def points(marker):
    return [[point.x, point.y, point.z] for point in marker.points]


def colour(value):
    return tuple(round(part, 3) for part in (value.r, value.g, value.b, value.a))


def test_a_move_starts_at_the_end_effector_and_the_newest_is_an_arrow():
    motion = Motion()
    motion.add(np.array([0.1, 0, 0]), False, np.array([1.0, 2, 3]), 10)
    motion.add(np.array([0, 0, 0.2]), True, np.array([1.0, 2, 4]), 10)
    lines, arrow = marker_array(motion.moves, to_stamp(5), "world").markers
    assert (lines.type, arrow.type, arrow.action) == (Marker.LINE_LIST, Marker.ARROW, Marker.ADD)
    np.testing.assert_allclose(points(lines), [[1, 2, 3], [1.1, 2, 3], [1, 2, 4], [1, 2, 4.2]])
    np.testing.assert_allclose(points(arrow), [[1, 2, 4], [1, 2, 4.2]])
    assert [colour(value) for value in lines.colors] == [COMPUTED] * 2 + [REUSED] * 2
    assert colour(arrow.color) == REUSED
    assert {(m.header.frame_id, stamp_ns(m.header.stamp), m.ns) for m in (lines, arrow)} == {("world", 5, "commanded")}


def test_without_a_pose_the_moves_hang_together_and_the_oldest_are_dropped():
    motion = Motion()
    for _ in range(3):
        motion.add(np.array([0.1, 0, 0]), False, None, 2)
    np.testing.assert_allclose([move.start[0] for move in motion.moves], [0.1, 0.2])
    np.testing.assert_allclose([move.end[0] for move in motion.moves], [0.2, 0.3])


def test_markers_without_points_or_length_are_deleted():
    assert [m.action for m in marker_array([], to_stamp(0), "world").markers] == [Marker.DELETE] * 2
    motion = Motion()
    motion.add(np.zeros(3), False, None, 10)
    lines, arrow = marker_array(motion.moves, to_stamp(0), "world").markers
    assert (lines.action, arrow.action) == (Marker.ADD, Marker.DELETE)


@pytest.mark.parametrize(
    ("camera", "topic"),
    [("wrist_2", "overlay/wrist_2"), ("front-left/rgb", "overlay/front_left_rgb"), ("3d", "overlay/_3d")],
)
def test_a_camera_s_name_becomes_a_topic_that_ros_takes(camera, topic):
    assert topic_of(camera) == topic


def test_nothing_is_drawn_while_nobody_subscribes(ros):
    display = Display(ros.node, ["front"], QoSProfile(depth=1))
    unreadable = Observation({"front": np.zeros((0, 0, 3), np.uint8)})
    show = (ActionStep(np.zeros(7, np.float32)), unreadable, to_stamp(0), {"front": "camera"})
    display.overlay(*show)
    ros.listen(Image, "/probe/overlay/front")
    ros.wait(lambda: ros.node.count_subscribers("/probe/overlay/front"))
    with pytest.raises(ZeroDivisionError):
        display.overlay(*show)


@pytest.mark.parametrize("name", ["libero", "robot"])
def test_rviz_shows_what_the_policy_of_the_graph_publishes(name):
    shown = yaml.safe_load((share_directory() / "launch" / "rviz" / f"{name}.rviz").read_text())
    topics = {display["Topic"]["Value"] for display in shown["Visualization Manager"]["Displays"] if "Topic" in display}
    cameras = yaml.safe_load(config_file(f"{name}.yaml").read_text())["policy"]["ros__parameters"]["cameras"]
    published = {f"/policy/{topic_of(entry.partition('=')[0])}" for entry in cameras} | {"/policy/markers"}
    assert {topic for topic in topics if topic.startswith("/policy/")} == published


class Watched:
    """A camera node with a video file, a policy before it, and somebody who looks on."""

    def __init__(self, ros, nodes, folder, **parameters) -> None:
        video = Video(folder / "video.mp4")
        for _ in range(10):
            video.add(np.full((64, 64, 3), 200, np.uint8))
        video.close()
        camera = {"source": str(folder / "video.mp4"), "rate": 10.0, "frame_id": "optical", "loop": True}
        policy = {"policy": "looker", "cameras": ["front=image_raw"], "reuse": "paper", **parameters}
        self.ros = ros
        self.overlays = ros.listen(Image, "/policy/overlay/front")
        self.markers = ros.listen(MarkerArray, "/policy/markers")
        self.twists = ros.listen(TwistStamped, "/policy/command")
        self.steps = ros.listen(DiagnosticArray, "/policy/step")
        ros.listen(JointState, "/policy/gripper_command")
        nodes.start("robot", only=("camera", "policy"), camera=camera, policy=policy)
        instructions = ros.node.create_publisher(String, "/instruction", LATCHED)
        instructions.publish(String(data="look"))
        for topic in ("/policy/overlay/front", "/policy/markers", "/policy/command", "/policy/step"):
            ros.wait(lambda topic=topic: ros.node.count_publishers(topic))
        ros.wait(lambda: ros.call(Trigger, "/policy/reset", Trigger.Request()).success)

    def more(self, messages, count):
        """Waits for that many more, and returns them."""
        before = len(messages)
        self.ros.wait(lambda: len(messages) >= before + count)
        return messages[before:]

    def set(self, **parameters):
        values = [Parameter(name, value=value).to_parameter_msg() for name, value in parameters.items()]
        request = SetParameters.Request(parameters=values)
        assert self.ros.call(SetParameters, "/policy/set_parameters", request).results[0].successful


def test_overlay_and_markers_of_a_video_carry_the_stamps_of_its_frames(ros, nodes, install, tmp_path):
    install(SOURCE, looker="Looker")
    watched = Watched(ros, nodes, tmp_path)

    def heard() -> list:
        """Overlays of frames of which everything was heard: one topic may be connected before another."""
        others = (watched.steps, watched.twists)
        stamps = [{stamp_ns(m.header.stamp) for m in messages} for messages in others]
        stamps.append({stamp_ns(m.markers[0].header.stamp) for m in watched.markers})
        return [m for m in watched.overlays if all(stamp_ns(m.header.stamp) in known for known in stamps)]

    ros.wait(lambda: len(heard()) >= 6)
    reused = {stamp_ns(m.header.stamp): m.status[0].message == "reused" for m in watched.steps}
    moves = {stamp_ns(m.markers[0].header.stamp): m.markers for m in watched.markers}
    seen = set()
    for message in heard():
        stamp = stamp_ns(message.header.stamp)
        picture, badge = read_image(message), overlay.REUSED if reused[stamp] else overlay.COMPUTED
        assert message.header.frame_id == "optical"
        assert tuple(picture[-1, 0]) == badge
        # Also where the action is reused, the picture shows what it was chosen by.
        np.testing.assert_allclose(picture[96, 96], 200, atol=6)
        np.testing.assert_allclose(picture[96 * 3, 96], 200 * overlay.DIMMED, atol=4)
        lines, arrow = moves[stamp]
        np.testing.assert_allclose(np.subtract(*points(arrow)[::-1]), STEP, rtol=1e-6)
        assert colour(lines.colors[-1]) == colour(arrow.color) == (REUSED if reused[stamp] else COMPUTED)
        assert lines.header.frame_id == "world"
        seen.add(reused[stamp])
    assert seen == {False, True}


def test_both_can_be_switched_off_while_the_robot_moves(ros, nodes, install, tmp_path):
    install(SOURCE, looker="Looker")
    watched = Watched(ros, nodes, tmp_path)
    watched.more(watched.overlays, 1)
    watched.set(overlay=False, markers=0)
    watched.more(watched.markers, 2)  # the first may still be of before
    overlays = len(watched.overlays)
    assert [m.action for m in watched.more(watched.markers, 2)[-1].markers] == [Marker.DELETE] * 2
    assert len(watched.overlays) == overlays
    watched.set(overlay=True)
    watched.more(watched.overlays, 1)


def test_tokens_that_cannot_be_drawn_are_reported_and_stop_no_command(ros, nodes, install, tmp_path):
    install(SOURCE, looker="Looker")
    watched = Watched(ros, nodes, tmp_path, policy_options='{"kept": [0, 4]}')
    watched.more(watched.twists, 3)
    ros.wait(lambda: "ActionStep.kept has tokens 0 to 4" in nodes.output())
    watched.more(watched.twists, 3)
