"""`flashvla trace`: what stands in a bag is what is drawn, of a run that the test records itself."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import TwistStamped
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger

from flashvla_ros.bag_trace import DECISION, GRIPPER, INSTRUCTION, STEP, TWIST, BagTrace, read_bag, trace_of
from flashvla_ros.cli import main
from flashvla_ros.diagnostics import OK, status, status_array, values_of
from flashvla_ros.messages import gripper_message, image_message, stamp_ns, to_stamp, twist_message
from flashvla_ros.qos import LATCHED
from flashvla_ros.recorder import Recorder
from flashvla_ros.trace_plot import draw_trace, spans, summary

SECOND = 10**9
TOPICS = {STEP: DiagnosticArray, TWIST: TwistStamped, GRIPPER: JointState, INSTRUCTION: String}


def report(stamp, message, **values):
    return status_array(to_stamp(stamp), status("policy", OK, message, values))


@pytest.fixture
def messages():
    """Two steps, of which the later was recorded first, and a gate that clamped it."""
    later, first = 3 * SECOND, 2 * SECOND
    numbers = {"reuse_angle": 4.5, "reuse_overlap": 0.75, "reuse_surprise": 12.0}
    twist = twist_message(np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0]), to_stamp(later), "world")
    return {
        STEP: {
            later: report(later, "reused", act_ms="0.5", reuse_reason="reused", **numbers),
            first: report(first, "computed", act_ms="20.5"),
        },
        TWIST: {later: twist},
        GRIPPER: {first: gripper_message(0.08, to_stamp(first))},
        DECISION: {first: report(first, "passed"), later: report(later, "clamped")},
    }


def test_steps_stand_in_the_order_of_their_stamps_with_what_was_said_of_each(messages):
    trace = trace_of(messages)
    nan = np.nan
    np.testing.assert_array_equal(trace.times, [0, 1])
    np.testing.assert_array_equal(trace.linear, [[nan] * 3, [1, 2, 3]])
    np.testing.assert_array_equal(trace.angular, [[nan] * 3, [4, 5, 6]])
    np.testing.assert_array_equal(trace.opening, [0.08, nan])
    np.testing.assert_array_equal(trace.reused, [False, True])
    np.testing.assert_array_equal(trace.corrected, [False, True])
    np.testing.assert_array_equal(trace.angle, [nan, 4.5])
    np.testing.assert_array_equal(trace.overlap, [nan, 0.75])
    np.testing.assert_array_equal(trace.surprise, [nan, 12])
    np.testing.assert_array_equal(trace.latency, [20.5, 0.5])
    assert trace.reasons == ("", "reused")


@pytest.mark.parametrize(
    ("marked", "expected"),
    [
        ([0, 0, 0, 0], []),
        ([1, 1, 0, 1], [(0.0, 2.0), (3.0, 4.0)]),
        ([0, 1, 1, 0], [(1.0, 3.0)]),
        ([1, 1, 1, 1], [(0.0, 4.0)]),
    ],
)
def test_a_span_goes_from_its_first_step_to_the_step_after_its_last(marked, expected):
    assert spans(np.array(marked, bool), np.arange(4.0)) == expected


def test_the_summary_counts_reuses_and_measures_the_policy(messages):
    trace = trace_of(messages)
    assert summary(trace) == "2 steps, 1 reused (50%); policy: mean 10.5 ms, p50 10.5, p99 20.3"
    assert summary(replace(trace, latency=np.full(2, np.nan))).endswith("latency unknown")


def drawn(trace: BagTrace, path) -> np.ndarray:
    """The picture, (H, W, 3) uint8 RGB."""
    draw_trace(trace, path)
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def test_the_time_of_reuses_is_shaded_and_panels_of_which_nothing_is_known_are_left_out(messages, tmp_path):
    trace, none = trace_of(messages), np.full(2, np.nan)
    everything = drawn(trace, tmp_path / "all.png")
    nothing = replace(trace, angle=none, overlap=none, surprise=none, reasons=("", ""), reused=np.zeros(2, bool))
    without = drawn(nothing, tmp_path / "few.png")
    shade = (245, 230, 223)  # the colour of reuse at 15 % on white
    shaded, unshaded = ((picture == shade).all(axis=-1) for picture in (everything, without))
    assert not unshaded.any()
    columns = np.flatnonzero(shaded.any(axis=0))
    assert shaded.sum() > 100_000
    assert columns[0] > everything.shape[1] / 2 - 100  # the second of two steps
    assert len(without) < 0.7 * len(everything)


def test_a_recorded_run_is_read_as_it_was_heard_and_drawn(ros, nodes, tmp_path, capsys):
    recorder = Recorder(tmp_path / "run", TOPICS, context=ros.context)
    ros.add(recorder)
    images = ros.node.create_publisher(Image, "/image_raw", 10)
    instruction = ros.node.create_publisher(String, "/instruction", LATCHED)
    heard = {topic: ros.listen(kind, topic) for topic, kind in TOPICS.items() if topic != INSTRUCTION}
    parameters = {"policy": "hold", "reuse": "paper", "cameras": ["front=image_raw"], "image_qos": "reliable depth=10"}
    nodes.start("robot", only=("policy",), policy=parameters)
    ros.connected(images)
    ros.wait(lambda: all(ros.node.count_publishers(topic) for topic in heard))
    instruction.publish(String(data="hold the cup"))
    ros.wait(lambda: ros.call(Trigger, "/policy/reset", Trigger.Request()).success)
    for number in range(5):
        images.publish(image_message(np.zeros((8, 8, 3), np.uint8), ros.node.get_clock().now().to_msg(), "front"))
        ros.wait(lambda number=number: len(heard[STEP]) > number)
    ros.wait(lambda: all(len(m) == recorder.counts[topic] == 5 for topic, m in heard.items()))
    recorder.close()
    recorder.destroy_node()

    trace = read_bag(tmp_path / "run")
    stamps = [stamp_ns(message.header.stamp) for message in heard[STEP]]
    np.testing.assert_allclose(trace.times, (np.array(stamps) - stamps[0]) * 1e-9)
    assert trace.reused.tolist() == [False, False, True, False, False]
    assert trace.latency.tolist() == [float(values_of(m.status[0])["act_ms"]) for m in heard[STEP]]
    assert (trace.linear == 0).all()
    np.testing.assert_allclose(trace.opening, 0.08)
    assert (trace.instruction, trace.outcome) == ("hold the cup", "")

    assert main(["trace", str(tmp_path / "run" / "bag"), str(tmp_path / "pictures" / "trace.png")]) == 0
    assert capsys.readouterr().out.startswith(summary(trace))
    assert cv2.imread(str(tmp_path / "pictures" / "trace.png")).shape[1] == 1200


def test_what_cannot_be_drawn_is_named_with_what_to_do(ros, tmp_path, capsys, messages):
    recorder = Recorder(tmp_path / "empty", {STEP: DiagnosticArray}, context=ros.context)
    recorder.close()
    recorder.destroy_node()
    for bag, said in (("nowhere", "nowhere cannot be read as a rosbag2"), ("empty", "has no message on /policy/step")):
        assert main(["trace", str(tmp_path / bag), str(tmp_path / "trace.png")]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"trace.mp4': name it \*.png, \*.svg, \*.pdf"):
        draw_trace(trace_of(messages), tmp_path / "trace.mp4")
