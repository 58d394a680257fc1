"""Records a graph: a rosbag2 MCAP of every topic, and an MP4 of the cameras side by side."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.serialization import deserialize_message
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, Image, JointState
from std_msgs.msg import String

from flashvla_ros.errors import RecordingError
from flashvla_ros.messages import read_image, stamp_ns
from flashvla_ros.qos import LATCHED

VIDEO_FPS = 20
BAG_VERSION: Literal[8] = 8  # rosbag2 from Iron on reads it
DEEP = QoSProfile(depth=1000)

LIBERO_TOPICS: dict[str, type] = {
    "/agentview/image_raw": Image,
    "/wrist/image_raw": Image,
    "/agentview/camera_info": CameraInfo,
    "/wrist/camera_info": CameraInfo,
    "/joint_states": JointState,
    "/eef_pose": PoseStamped,
    "/clock": Clock,
    "/instruction": String,
    "/policy/command": TwistStamped,
    "/policy/gripper_command": JointState,
    "/command": TwistStamped,
    "/gripper_command": JointState,
    "/policy/step": DiagnosticArray,
    "/command_gate/decision": DiagnosticArray,
    "/sim_bridge/step": DiagnosticArray,
    "/sim_bridge/outcome": DiagnosticArray,
    "/diagnostics": DiagnosticArray,
}
LATCHED_TOPICS = ("/instruction", "/sim_bridge/outcome")
LIBERO_CAMERAS = ("/agentview/image_raw", "/wrist/image_raw")


class Video:
    """H.264 in an MP4. Frames: (H, W, 3) uint8 RGB, all of one size."""

    def __init__(self, path: Path, fps: int = VIDEO_FPS) -> None:
        self._container = av.open(str(path), "w")
        self._stream: Any = None
        self._fps = fps
        self.frames = 0

    def add(self, frame: np.ndarray) -> None:
        if self._stream is None:
            height, width = (side - side % 2 for side in frame.shape[:2])  # yuv420p takes even sides only
            self._stream = self._container.add_stream("libx264", rate=Fraction(self._fps))
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
            self._stream.options = {"crf": "20", "preset": "veryfast"}
        frame = np.ascontiguousarray(frame[: self._stream.height, : self._stream.width])
        self._mux(av.VideoFrame.from_ndarray(frame, format="rgb24"))
        self.frames += 1

    def _mux(self, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            self._container.mux(packet)

    def close(self) -> None:
        if self._stream is not None:
            self._mux(None)
        self._container.close()


class Recorder(Node):
    """Writes what it hears to `folder`/bag and `folder`/cameras.mp4.

    topics: topic -> message type. cameras: image topics shown in the video, left to right.
    A write that fails (a full disk) ends the recording, not the node: `error` then says what and where.
    """

    def __init__(self, folder: Path, topics: Mapping[str, type], cameras: Sequence[str] = (), **options: Any) -> None:
        super().__init__("recorder", start_parameter_services=False, enable_rosout=False, **options)
        self.error: RecordingError | None = None
        self.counts: dict[str, int] = dict.fromkeys(topics, 0)
        self._folder, self._cameras = folder, tuple(cameras)
        self._frames: dict[int, dict[str, np.ndarray]] = {}
        self._typestore = get_typestore(Stores.ROS2_HUMBLE)
        self._bag: Writer | None = None
        self._video: Video | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._bag = Writer(folder / "bag", version=BAG_VERSION, storage_plugin=StoragePlugin.MCAP)
            self._bag.open()
            self._video = Video(folder / "cameras.mp4") if cameras else None
            self._connections = {topic: self._connect(topic, kind) for topic, kind in topics.items()}
        except Exception as error:
            raise RecordingError(f"cannot record to {folder}: {error}") from error
        for topic, kind in topics.items():
            self.create_subscription(
                kind,
                topic,
                lambda data, topic=topic, kind=kind: self._on_message(topic, kind, data),
                LATCHED if topic in LATCHED_TOPICS else DEEP,
                raw=True,
            )

    def _connect(self, topic: str, kind: type) -> Any:
        assert self._bag is not None
        package, _, _ = kind.__module__.partition(".")
        qos = LATCHED if topic in LATCHED_TOPICS else DEEP
        latched = qos.durability is DurabilityPolicy.TRANSIENT_LOCAL
        forever = QosTime(2147483647, 4294967295)
        offered = Qos(
            QosHistory.KEEP_LAST,
            qos.depth,
            QosReliability.RELIABLE,
            QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE,
            forever,
            forever,
            QosLiveliness.AUTOMATIC,
            forever,
            False,
        )
        return self._bag.add_connection(
            topic, f"{package}/msg/{kind.__name__}", typestore=self._typestore, offered_qos_profiles=[offered]
        )

    def _on_message(self, topic: str, kind: type, data: bytes) -> None:
        if self.error is not None or self._bag is None:
            return
        try:
            self._bag.write(self._connections[topic], time.time_ns(), data)
            self.counts[topic] += 1
            if topic in self._cameras:
                self._add_frame(topic, deserialize_message(data, kind))
        except Exception as error:
            self._fail(error)

    def _add_frame(self, topic: str, message: Image) -> None:
        images = self._frames.setdefault(stamp_ns(message.header.stamp), {})
        images[topic] = read_image(message)
        if len(images) == len(self._cameras) and self._video is not None:
            self._video.add(np.hstack([images[name] for name in self._cameras]))
            self._frames.clear()

    def _fail(self, error: Exception) -> None:
        self.error = RecordingError(f"recording to {self._folder} stopped: {error}; what came before is kept")
        self.get_logger().error(str(self.error))

    def close(self) -> None:
        """Finishes the files. After a failure it only closes them: their ends may be missing."""
        for part in (self._bag, self._video):
            if part is None:
                continue
            if self.error is not None:
                with contextlib.suppress(Exception):  # the first error is the one to report
                    part.close()
                continue
            try:
                part.close()
            except Exception as error:
                self._fail(error)
        self._bag = self._video = None
