"""Between messages and arrays: exact where it must be, refusing what lies."""

from __future__ import annotations

import array

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from hypothesis import given
from hypothesis import strategies as st
from sensor_msgs.msg import CompressedImage, Image, JointState

from flashvla_ros.errors import MessageError
from flashvla_ros.messages import (
    action_to_twist,
    compressed_message,
    gripper_message,
    image_message,
    pose_message,
    read_compressed,
    read_gripper,
    read_image,
    read_joints,
    read_pose,
    read_twist,
    stamp_ns,
    to_stamp,
    twist_message,
    twist_to_action,
)
from mllm.policy import ActionSpec

NOW = Time(sec=3, nanosec=5)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 7, 3), np.uint8)


def raw(encoding: str, pixels: np.ndarray, padding: int = 0) -> Image:
    height, width = pixels.shape[:2]
    rows = np.zeros((height, pixels[0].size + padding), np.uint8)
    rows[:, : pixels[0].size] = pixels.reshape(height, -1)
    message = Image(height=height, width=width, encoding=encoding, step=rows.shape[1])
    message.data = array.array("B", rows.tobytes())
    return message


def test_image_round_trip_is_exact():
    message = image_message(PIXELS, NOW, "camera")
    np.testing.assert_array_equal(read_image(message), PIXELS)
    assert message.header.frame_id == "camera"


@pytest.mark.parametrize(
    ("encoding", "pixels"),
    [
        ("rgb8", PIXELS),
        ("bgr8", PIXELS[..., ::-1]),
        ("rgba8", np.dstack([PIXELS, PIXELS[..., :1]])),
        ("bgra8", np.dstack([PIXELS[..., ::-1], PIXELS[..., :1]])),
    ],
)
@pytest.mark.parametrize("padding", [0, 1, 13])
def test_colour_encodings_and_padded_steps_read_as_rgb(encoding, pixels, padding):
    np.testing.assert_array_equal(read_image(raw(encoding, pixels, padding)), PIXELS)


def test_mono_reads_as_three_equal_channels():
    grey = PIXELS[..., :1]
    np.testing.assert_array_equal(read_image(raw("mono8", grey, 2)), np.repeat(grey, 3, axis=2))


def test_wrong_encoding_is_refused_by_name():
    with pytest.raises(MessageError, match="16UC1"):
        read_image(raw("16UC1", PIXELS))


def test_truncated_image_is_refused_with_both_sizes():
    message = raw("rgb8", PIXELS)
    message.data = message.data[:-1]
    with pytest.raises(MessageError, match=r"truncated image: 104 bytes.*105"):
        read_image(message)


def test_step_shorter_than_a_row_is_refused():
    message = raw("rgb8", PIXELS)
    message.step = 20
    with pytest.raises(MessageError, match="step of 20"):
        read_image(message)


@pytest.mark.parametrize(("height", "width"), [(0, 7), (5, 0), (100_000, 7)])
def test_impossible_size_is_refused(height, width):
    message = raw("rgb8", PIXELS)
    message.height, message.width = height, width
    with pytest.raises(MessageError, match="each side"):
        read_image(message)


@given(
    st.binary(max_size=400),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["rgb8", "mono8", "bgra8", "", "32FC1"]),
)
def test_any_image_message_is_read_or_refused(data, height, width, step, encoding):
    message = Image(height=height, width=width, step=step, encoding=encoding)
    message.data = array.array("B", data)
    try:
        image = read_image(message)
    except MessageError:
        return
    assert image.shape == (height, width, 3)


def test_compressed_round_trip_is_close():
    smooth = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)[..., None].repeat(3, 2)
    decoded = read_compressed(compressed_message(smooth, NOW, "camera", 95))
    assert np.abs(decoded.astype(int) - smooth).max() <= 4


@pytest.mark.parametrize("data", [b"", b"not a jpeg", b"\xff\xd8\xff"])
def test_undecodable_compressed_image_is_refused(data):
    message = CompressedImage(format="jpeg")
    message.data = array.array("B", data)
    with pytest.raises(MessageError, match="cannot be decoded"):
        read_compressed(message)


def jpeg(pixels: np.ndarray) -> bytes:
    return bytes(compressed_message(pixels, NOW, "camera", 95).data)


def test_a_cut_jpeg_is_refused():
    # Some decoders fill the missing rows with grey and say nothing.
    message = CompressedImage(format="jpeg")
    message.data = array.array("B", jpeg(RNG.integers(0, 256, (64, 64, 3), np.uint8))[:-400])
    with pytest.raises(MessageError, match=r"'jpeg' .* cannot be decoded: it is cut or no image"):
        read_compressed(message)


def test_a_jpeg_that_claims_more_pixels_than_opencv_allows_is_refused():
    data = bytearray(jpeg(PIXELS))
    frame = data.index(b"\xff\xc0")  # the marker, two bytes of length, one of precision, then height and width
    data[frame + 5 : frame + 9] = np.array([65500, 65500], ">u2").tobytes()
    message = CompressedImage(format="jpeg")
    message.data = array.array("B", bytes(data))
    with pytest.raises(MessageError, match="refused by OpenCV"):
        read_compressed(message)


@given(st.integers(0, 2**31 * 10**9 - 1))
def test_stamp_round_trip(nanoseconds):
    assert stamp_ns(to_stamp(nanoseconds)) == nanoseconds


def test_pose_and_twist_round_trip():
    position, quaternion = np.array([0.1, -0.2, 0.3]), np.array([0.0, 0.6, 0.0, 0.8])
    read = read_pose(pose_message(position, quaternion, NOW, "world"), "world")
    np.testing.assert_array_equal(read[0], position)
    np.testing.assert_array_equal(read[1], quaternion)
    linear, angular = read_twist(twist_message(position, -position, NOW, "world"))
    np.testing.assert_array_equal(linear, position)
    np.testing.assert_array_equal(angular, -position)


def test_a_pose_in_another_frame_is_refused_with_both():
    message = pose_message(np.zeros(3), np.array([0, 0, 0, 1]), NOW, "base_link")
    with pytest.raises(MessageError, match=r"the pose is in 'base_link', .*: publish it in 'world'"):
        read_pose(message, "world")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("index", range(7))
def test_a_pose_that_is_not_finite_is_refused(index, value):
    numbers = np.array([0, 0, 0, 0, 0, 0, 1.0])
    numbers[index] = value
    with pytest.raises(MessageError, match="not finite: the pose"):
        read_pose(pose_message(numbers[:3], numbers[3:], NOW, "world"), "world")


def test_joints_are_read_by_name_in_the_order_asked_for():
    message = JointState(name=["a", "b", "c"], position=[0.1, 0.2, float("nan")])
    assert read_joints(message, ["b", "a"]).tolist() == [0.2, 0.1]  # what nobody asks for may be anything
    with pytest.raises(MessageError, match="lack d, e; they have a, b, c"):
        read_joints(message, ["d", "a", "e"])
    with pytest.raises(MessageError, match="not finite: joint 'c' is at nan"):
        read_joints(message, ["a", "c"])


@pytest.mark.parametrize("positions", [[], [0.1, 0.2]])
def test_gripper_command_needs_exactly_one_position(positions):
    with pytest.raises(MessageError, match=f"{len(positions)} positions"):
        read_gripper(JointState(position=positions))


# Below 1e-6 a number that shares its float64 with 1 cannot come back to the last bit; no gripper is that fine.
gripper = st.floats(-1, 1, width=32).filter(lambda v: v == 0 or abs(v) >= 2**-20)
component = st.floats(-1, 1, width=32, allow_subnormal=False)


@given(st.tuples(*[component] * 6, gripper))
def test_action_survives_the_wire_bit_for_bit(numbers):
    action, spec = np.array(numbers, np.float32), ActionSpec()
    linear, angular, opening = action_to_twist(action, spec, 0.08)
    wire_linear, wire_angular = read_twist(twist_message(linear, angular, NOW, "world"))
    back = twist_to_action(wire_linear, wire_angular, read_gripper(gripper_message(opening, NOW)), spec, 0.08)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, action)


def test_one_unit_is_five_centimetres_a_step_at_20_hz():
    linear, angular, opening = action_to_twist(np.array([1, 0, 0, 0, 0, 1, -1], np.float32), ActionSpec(), 0.08)
    np.testing.assert_allclose(linear, [1.0, 0, 0])  # 0.05 m x 20 Hz
    np.testing.assert_allclose(angular, [0, 0, 10.0])  # 0.5 rad x 20 Hz
    assert opening == pytest.approx(0.08)
