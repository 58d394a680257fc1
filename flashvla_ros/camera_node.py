"""A camera, stream, video file or folder of images as a node: image, JPEG and camera_info with the capture time."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from rclpy.node import Node
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from flashvla_ros.calibration import read_calibration
from flashvla_ros.capture import Capture, Frame, State
from flashvla_ros.diagnostics import ERROR, OK, WARN, Diagnostics, Report, Window
from flashvla_ros.errors import ConfigurationError
from flashvla_ros.fields import param, require, require_positive
from flashvla_ros.messages import compressed_message, image_message, to_stamp
from flashvla_ros.parameters import NodeParameters
from flashvla_ros.qos import parse_qos
from flashvla_ros.runner import run_node
from flashvla_ros.sources import CaptureParameters, first_image, make_source


@dataclass(frozen=True)
class CameraParameters(CaptureParameters):
    image_topic: str = param(
        "image_raw",
        "images (sensor_msgs/Image, rgb8); JPEG goes to this topic + /compressed, "
        "encoded only while someone subscribes",
    )
    camera_info_topic: str = param("camera_info", "calibration with the stamp of each image (sensor_msgs/CameraInfo)")
    image_qos: str = param("best_effort depth=2", "QoS of image, JPEG and camera_info")
    frame_id: str = param("camera", "optical frame of the camera: x right, y down, z forward")
    calibration: str = param(
        "",
        "YAML of ROS camera_calibration, for images of the published size; empty = "
        "uncalibrated, camera_info then has zero K",
    )
    jpeg_quality: int = param(90, "1 to 100", dynamic=True)
    min_rate_ratio: float = param(0.8, "share of the wanted rate below which /diagnostics warns; 0 = never")
    rate_window: float = param(5.0, "s over which the rate is measured")
    diagnostics_period: float = param(1.0, "s between two messages on /diagnostics")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.jpeg_quality <= 100, "jpeg_quality", self.jpeg_quality, "1 to 100")
        require(0 <= self.min_rate_ratio < 1, "min_rate_ratio", self.min_rate_ratio, "0 to below 1")
        require_positive(self, "rate_window", "diagnostics_period")
        require(
            self.rate == 0 or self.rate_window * self.rate >= 2,
            "rate_window",
            self.rate_window,
            f"at least two frames long: {2 / (self.rate or 1):.1f} s at {self.rate} Hz",
        )


class RateMeter:
    """Events per second over the newest `window` seconds."""

    def __init__(self, window: float) -> None:
        self._window = window
        self._times: deque[float] = deque()

    def add(self, now: float) -> None:
        """now: monotonic s."""
        self._times.append(now)
        self._forget(now)

    def rate(self, now: float) -> float:
        """Hz; NaN with fewer than two events. It sinks while events stay away."""
        self._forget(now)
        count = len(self._times)
        if count < 2:
            return math.nan
        first, last = self._times[0], self._times[-1]
        return min((count - 1) / (last - first), count / (now - first))

    def _forget(self, now: float) -> None:
        while self._times and self._times[0] < now - self._window:
            self._times.popleft()


class CameraNode(Node):
    """Thin: `Capture` reads in its thread, this publishes what it has, woken by a guard condition."""

    def __init__(self) -> None:
        super().__init__("camera", automatically_declare_parameters_from_overrides=True)
        self._params = NodeParameters(self, CameraParameters)
        p = self._params.value
        self._calibration = read_calibration(p.calibration) if p.calibration else None
        if p.width:
            self._check_size(p.width, p.height)
        source = make_source(p)
        if not source.live:
            height, width, _ = first_image(source, p).shape
            self._check_size(width, height)
        qos = parse_qos(p.image_qos, "image_qos")
        self._images = self.create_publisher(Image, p.image_topic, qos)
        # Behind a remapping of the image, as image_transport does it.
        self._jpegs = self.create_publisher(CompressedImage, f"{self._images.topic_name}/compressed", qos)
        self._infos = self.create_publisher(CameraInfo, p.camera_info_topic, qos)
        self._published, self._size_warning = 0, ""
        self._state = State.CONNECTING
        self._latency, self._rate = Window(), RateMeter(p.rate_window)
        news = self.create_guard_condition(self._on_news)
        self._capture = Capture(source, p, lambda: self.get_clock().now().nanoseconds, news.trigger, self.get_logger())
        self._diagnostics = Diagnostics(self, self._report, p.diagnostics_period)
        self._capture.start()

    def _check_size(self, width: int, height: int) -> None:
        info = self._calibration
        if info is not None and (info.width, info.height) != (width, height):
            raise ConfigurationError(
                f"calibration '{self._params.value.calibration}' is for {info.width} x {info.height} pixels, but "
                f"images are published with {width} x {height}: calibrate at that size, or set 'width' and 'height'"
            )

    def _on_news(self) -> None:
        frame = self._capture.take()
        if frame is not None:
            self._publish(frame)
        if self._capture.state is not self._state:
            self._state = self._capture.state
            self._diagnostics.publish()

    def _publish(self, frame: Frame) -> None:
        p = self._params.value
        if not frame.stamp_ns:
            self.get_logger().warning("use_sim_time is set and no /clock came yet: images are stamped 0", once=True)
        stamp = to_stamp(frame.stamp_ns)
        self._images.publish(image_message(frame.image, stamp, p.frame_id))
        self._infos.publish(self._info(frame.image, stamp))
        now = time.monotonic()
        self._published += 1
        self._latency.add(now - frame.captured)
        self._rate.add(now)
        if self._jpegs.get_subscription_count():
            self._jpegs.publish(compressed_message(frame.image, stamp, p.frame_id, p.jpeg_quality))

    def _info(self, image: np.ndarray, stamp: Any) -> CameraInfo:
        height, width, _ = image.shape
        info, warning = self._calibration, ""
        if info is not None and (info.width, info.height) != (width, height):
            warning = (
                f"images of {width} x {height} pixels, calibration for {info.width} x {info.height}: "
                "camera_info says uncalibrated"
            )
        if warning and warning != self._size_warning:
            self.get_logger().error(warning)
        self._size_warning = warning
        if info is None or warning:
            info = CameraInfo(width=width, height=height)
        info.header.stamp, info.header.frame_id = stamp, self._params.value.frame_id
        return info

    def _report(self) -> Report:
        capture, p = self._capture, self._params.value
        measured, wanted = self._rate.rate(time.monotonic()), capture.wanted_rate
        values: dict[str, object] = {
            "state": capture.state.value,
            "source": capture.source_name,
            "rate_hz": f"{measured:.2f}",
            "wanted_rate_hz": f"{wanted:.2f}" if wanted else "the source's",
            "published": self._published,
            **capture.counts,
            **self._latency.summary("capture_to_publish"),
        }
        silent = capture.silent_for()
        if capture.state is State.DISCONNECTED:
            return ERROR, f"disconnected: {capture.reason}; trying again", values
        if capture.state is State.CONNECTED and silent > p.read_timeout:
            return ERROR, f"no frame for {silent:.1f} s", values
        if capture.state is not State.CONNECTED:
            return WARN, f"{capture.state.value}: {capture.reason}", values
        if self._size_warning:
            return WARN, self._size_warning, values
        if wanted and measured < p.min_rate_ratio * wanted:
            return WARN, f"{measured:.1f} Hz instead of {wanted:.1f} Hz", values
        return OK, "first frame" if math.isnan(measured) else f"{measured:.1f} Hz", values

    def close(self) -> None:
        """The source is free for another process when this returns."""
        self._capture.stop()


def main() -> int:
    return run_node(CameraNode)


if __name__ == "__main__":
    sys.exit(main())
