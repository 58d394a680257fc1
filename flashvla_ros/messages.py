"""Between ROS messages and plain values: images, stamps, actions. Pure functions; a message that lies is refused."""

from __future__ import annotations

import array
import math
from collections.abc import Sequence

import cv2
import numpy as np
from builtin_interfaces.msg import Time
from geometry_msgs.msg import PoseStamped, TwistStamped
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, JointState

from flashvla_ros.errors import MessageError
from flashvla_ros.sources import CorruptImage, decode_image
from mllm.policy import ActionSpec

GRIPPER_JOINT = "gripper"
MAX_IMAGE_SIDE = 8192

# encoding -> (channels, conversion to RGB)
_ENCODINGS = {
    "rgb8": (3, None),
    "bgr8": (3, cv2.COLOR_BGR2RGB),
    "mono8": (1, cv2.COLOR_GRAY2RGB),
    "rgba8": (4, cv2.COLOR_RGBA2RGB),
    "bgra8": (4, cv2.COLOR_BGRA2RGB),
}


def stamp_ns(stamp: Time) -> int:
    """Nanoseconds of a message stamp."""
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def to_stamp(nanoseconds: int) -> Time:
    """A message stamp from nanoseconds."""
    return Time(sec=nanoseconds // 1_000_000_000, nanosec=nanoseconds % 1_000_000_000)


def image_message(image: np.ndarray, stamp: Time, frame_id: str) -> Image:
    """image: (H, W, 3) uint8 RGB."""
    height, width, _ = image.shape
    message = Image(height=height, width=width, encoding="rgb8", step=3 * width)
    message.header.stamp, message.header.frame_id = stamp, frame_id
    message.data = array.array("B", image.tobytes())  # any other type makes rclpy check every byte in Python
    return message


def read_image(message: Image) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a raw image; rows may be padded (`step`).

    Raises MessageError: an encoding other than rgb8, bgr8, mono8, rgba8, bgra8; a size of 0 or beyond 8192;
    a step shorter than a row; fewer bytes than height x step.
    """
    if message.encoding not in _ENCODINGS:
        raise MessageError(f"image encoding '{message.encoding}' is not one of {', '.join(_ENCODINGS)}")
    channels, conversion = _ENCODINGS[message.encoding]
    height, width, step = message.height, message.width, message.step
    if not (0 < height <= MAX_IMAGE_SIDE and 0 < width <= MAX_IMAGE_SIDE):
        raise MessageError(f"image of {width} x {height} pixels: each side must be 1 to {MAX_IMAGE_SIDE}")
    if step < width * channels:
        raise MessageError(f"image step of {step} bytes is shorter than a row ({width} x {channels} bytes)")
    if len(message.data) < height * step:
        raise MessageError(f"truncated image: {len(message.data)} bytes, but height x step = {height * step}")
    rows = np.frombuffer(message.data, np.uint8, height * step).reshape(height, step)
    pixels = rows[:, : width * channels].reshape(height, width, channels)
    return np.ascontiguousarray(pixels) if conversion is None else cv2.cvtColor(pixels, conversion)


def compressed_message(image: np.ndarray, stamp: Time, frame_id: str, quality: int) -> CompressedImage:
    """JPEG of a (H, W, 3) uint8 RGB image."""
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not ok:
        raise MessageError(f"an image of shape {image.shape} cannot be encoded as JPEG")
    message = CompressedImage(format="rgb8; jpeg compressed bgr8")
    message.header.stamp, message.header.frame_id = stamp, frame_id
    message.data = array.array("B", data.tobytes())
    return message


def read_compressed(message: CompressedImage) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a compressed image (JPEG or PNG). Raises MessageError when it cannot be decoded."""
    try:
        return decode_image(bytes(message.data))
    except CorruptImage as error:
        raise MessageError(f"compressed image of format '{message.format}' {error}") from error


def camera_info_message(intrinsics: np.ndarray, width: int, height: int, stamp: Time, frame_id: str) -> CameraInfo:
    """A pinhole camera without distortion. intrinsics: (3, 3), pixels."""
    message = CameraInfo(width=width, height=height, distortion_model="plumb_bob", d=[0.0] * 5)
    message.header.stamp, message.header.frame_id = stamp, frame_id
    k = [float(v) for v in np.asarray(intrinsics, float).ravel()]
    message.k, message.r = k, [1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0]
    message.p = [*k[0:3], 0.0, *k[3:6], 0.0, *k[6:9], 0.0]
    return message


def pose_message(position: np.ndarray, quaternion: np.ndarray, stamp: Time, frame_id: str) -> PoseStamped:
    """position: (3,) m; quaternion: (4,) xyzw; both in `frame_id`."""
    message = PoseStamped()
    message.header.stamp, message.header.frame_id = stamp, frame_id
    p, q = message.pose.position, message.pose.orientation
    p.x, p.y, p.z = (float(v) for v in position)
    q.x, q.y, q.z, q.w = (float(v) for v in quaternion)
    return message


def read_pose(message: PoseStamped, frame_id: str) -> tuple[np.ndarray, np.ndarray]:
    """Position (3,) m and quaternion (4,) xyzw, in `frame_id`. Raises MessageError: another frame, NaN or infinity."""
    if message.header.frame_id != frame_id:
        raise MessageError(
            f"wrong frame: the pose is in '{message.header.frame_id}', the policy acts in '{frame_id}': "
            f"publish it in '{frame_id}'"
        )
    p, q = message.pose.position, message.pose.orientation
    position, quaternion = np.array([p.x, p.y, p.z]), np.array([q.x, q.y, q.z, q.w])
    if not (np.isfinite(position).all() and np.isfinite(quaternion).all()):
        raise MessageError(f"not finite: the pose is at {position} m with quaternion {quaternion}")
    return position, quaternion


def read_joints(message: JointState, names: Sequence[str]) -> np.ndarray:
    """Positions of the named joints, rad or m. Raises MessageError: one is missing, NaN or infinity."""
    positions = dict(zip(message.name, message.position, strict=False))
    missing = [name for name in names if name not in positions]
    if missing:
        raise MessageError(f"joint states lack {', '.join(missing)}; they have {', '.join(message.name)}")
    for name in names:
        if not math.isfinite(positions[name]):
            raise MessageError(f"not finite: joint '{name}' is at {positions[name]}")
    return np.array([positions[name] for name in names])


def twist_message(linear: np.ndarray, angular: np.ndarray, stamp: Time, frame_id: str) -> TwistStamped:
    """linear: (3,) m/s; angular: (3,) rad/s; both in `frame_id`."""
    message = TwistStamped()
    message.header.stamp, message.header.frame_id = stamp, frame_id
    v, w = message.twist.linear, message.twist.angular
    v.x, v.y, v.z = (float(x) for x in linear)
    w.x, w.y, w.z = (float(x) for x in angular)
    return message


def read_twist(message: TwistStamped) -> tuple[np.ndarray, np.ndarray]:
    """Linear (3,) m/s and angular (3,) rad/s."""
    v, w = message.twist.linear, message.twist.angular
    return np.array([v.x, v.y, v.z]), np.array([w.x, w.y, w.z])


def gripper_message(opening: float, stamp: Time) -> JointState:
    """opening: distance between the fingers, m."""
    message = JointState(name=[GRIPPER_JOINT], position=[float(opening)])
    message.header.stamp = stamp
    return message


def read_gripper(message: JointState) -> float:
    """The opening in metres. Raises MessageError unless the message carries exactly one position."""
    if len(message.position) != 1:
        raise MessageError(f"gripper command with {len(message.position)} positions: it must carry exactly one (m)")
    return float(message.position[0])


def action_to_twist(action: np.ndarray, spec: ActionSpec, max_opening: float) -> tuple[np.ndarray, np.ndarray, float]:
    """An action (7,) float32 as physical quantities: linear (3,) m/s, angular (3,) rad/s, gripper opening m.

    `twist_to_action` gives the same float32 back: both sides work in float64, whose rounding errors vanish in float32.
    """
    a = np.asarray(action, np.float32).astype(np.float64)
    linear = a[:3] * (spec.translation_scale * spec.control_freq)
    angular = a[3:6] * (spec.rotation_scale * spec.control_freq)
    return linear, angular, float((1.0 - a[6]) * (0.5 * max_opening))


def twist_to_action(
    linear: np.ndarray, angular: np.ndarray, opening: float, spec: ActionSpec, max_opening: float
) -> np.ndarray:
    """The action (7,) float32 that `action_to_twist` turned into these quantities."""
    return np.concatenate(
        [
            np.asarray(linear, float) / (spec.translation_scale * spec.control_freq),
            np.asarray(angular, float) / (spec.rotation_scale * spec.control_freq),
            [1.0 - opening / (0.5 * max_opening)],
        ]
    ).astype(np.float32)
