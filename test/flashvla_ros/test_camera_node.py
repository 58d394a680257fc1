"""The camera node as its own process, with real files, a real HTTP stream and a real subscriber."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
import rclpy
import yaml
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rcl_interfaces.msg import SetParametersResult
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.parameter_client import AsyncParameterClient
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from flashvla_ros.calibration import read_calibration
from flashvla_ros.camera_node import CameraParameters, RateMeter
from flashvla_ros.diagnostics import ERROR, OK, WARN, values_of
from flashvla_ros.errors import ConfigurationError
from flashvla_ros.messages import read_compressed, read_image, stamp_ns
from flashvla_ros.qos import parse_qos

ENVIRONMENT = {"ROS_DOMAIN_ID": str(1 + os.getpid() % 90), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
LIMIT = 20.0  # s
EVERY_FRAME = "reliable transient_local depth=100"  # a subscriber that comes late gets all frames all the same

CALIBRATION = {
    "image_width": 64,
    "image_height": 48,
    "camera_name": "wrist",
    "camera_matrix": {"rows": 3, "cols": 3, "data": [60.0, 0, 31.5, 0, 61.0, 23.5, 0, 0, 1]},
    "distortion_model": "plumb_bob",
    "distortion_coefficients": {"rows": 1, "cols": 5, "data": [0.1, -0.2, 0.003, 0.004, 0.05]},
    "rectification_matrix": {"rows": 3, "cols": 3, "data": [1, 0, 0, 0, 1, 0, 0, 0, 1]},
    "projection_matrix": {"rows": 3, "cols": 4, "data": [58.0, 0, 31.5, 0, 0, 59.0, 23.5, 0, 0, 0, 1, 0]},
}


def write_images(folder: Path, count: int, seed: int = 0) -> list[np.ndarray]:
    """Writes images (48, 64, 3) of random pixels; returns them as RGB."""
    folder.mkdir(exist_ok=True)
    images = list(np.random.default_rng(seed).integers(0, 256, (count, 48, 64, 3), np.uint8))
    for index, image in enumerate(images):
        cv2.imwrite(str(folder / f"{index}.png"), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return images


def write_calibration(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump(CALIBRATION | changes))
    return path


class Camera:
    """A camera_node process under a namespace of its own, and all that it publishes."""

    _numbers = itertools.count()

    def __init__(self, node: Node, executor: SingleThreadedExecutor, log: Path, parameters: dict[str, object]) -> None:
        self._node, self._executor, self._log = node, executor, log
        self._namespace = f"/camera_{next(self._numbers)}"
        self.diagnostics: list[DiagnosticStatus] = []
        self._subscriptions = [node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 100)]
        arguments = [f"{name}:={value}" for name, value in parameters.items()]
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "flashvla_ros.camera_node",
                    "--ros-args",
                    "-r",
                    f"__ns:={self._namespace}",
                    "-r",
                    f"__node:={self._namespace[1:]}",
                    *itertools.chain(*(("-p", a) for a in arguments)),
                ],
                env=os.environ | ENVIRONMENT,
                stderr=stderr,
                stdout=stderr,
            )

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        name = f"{self._namespace}{self._namespace}"[1:]
        self.diagnostics += [s for s in message.status if s.name == name]

    def listen(self, kind: type, topic: str, qos: str = EVERY_FRAME) -> list:
        """The messages of one topic, as they come."""
        messages: list = []
        self._subscriptions.append(
            self._node.create_subscription(kind, f"{self._namespace}/{topic}", messages.append, parse_qos(qos))
        )
        return messages

    def spin_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < deadline, f"the condition did not come true; the node says:\n{self.said()}"
            self._executor.spin_once(timeout_sec=0.05)

    def wait_for_status(self, level: bytes, text: str = "") -> DiagnosticStatus:
        """The first status from now on with this level whose message contains the text."""
        seen = len(self.diagnostics)

        def found() -> list[DiagnosticStatus]:
            return [s for s in self.diagnostics[seen:] if s.level == level and text in s.message]

        self.spin_until(lambda: bool(found()))
        return found()[0]

    def set_parameters(self, **values: object) -> list[SetParametersResult]:
        client = AsyncParameterClient(self._node, f"{self._namespace}{self._namespace}")
        self.spin_until(client.services_are_ready)
        future = client.set_parameters([Parameter(name, value=value) for name, value in values.items()])
        self.spin_until(future.done)
        return future.result().results

    def said(self) -> str:
        return self._log.read_text()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal and returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(LIMIT)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(LIMIT)
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)


@pytest.fixture(scope="module")
def ros() -> Iterator[tuple[Node, SingleThreadedExecutor]]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        context = Context()
        rclpy.init(context=context)
        node = Node("camera_listener", context=context)
        executor = SingleThreadedExecutor(context=context)
        executor.add_node(node)
        yield node, executor
        executor.shutdown()
        node.destroy_node()
        context.shutdown()


@pytest.fixture
def start(ros: tuple[Node, SingleThreadedExecutor], tmp_path: Path) -> Iterator[Callable[..., Camera]]:
    cameras: list[Camera] = []

    def make(source: object, **parameters: object) -> Camera:
        cameras.append(Camera(*ros, tmp_path / f"camera{len(cameras)}.log", {"source": source, **parameters}))
        return cameras[-1]

    yield make
    for camera in cameras:
        camera.close()


class Stream:
    """A Motion JPEG server on 127.0.0.1: each connection gets `burst` frames, then it is closed, or kept silent."""

    def __init__(self) -> None:
        self.burst, self.silent, self.connections = 1_000_000, False, 0
        self.released = threading.Event()
        stream = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stream.serve(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/video"

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        self.connections += 1
        handler.send_response(200)
        handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        handler.end_headers()
        jpeg = cv2.imencode(".jpg", np.full((48, 64, 3), 128, np.uint8))[1].tobytes()
        part = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n" % (len(jpeg), jpeg)
        sent = 0
        try:
            while sent < self.burst and not self.released.wait(0.02):
                handler.wfile.write(part)
                sent += 1
            if self.silent:
                self.released.wait(LIMIT)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the camera went first

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def stream() -> Iterator[Stream]:
    server = Stream()
    yield server
    server.close()


# ---------------------------------------------------------------------- what is published


def test_a_folder_arrives_whole_in_order_with_exact_pixels_and_its_calibration(
    start: Callable[..., Camera], tmp_path: Path
) -> None:
    images = write_images(tmp_path / "images", 30)
    begin = time.time_ns()
    camera = start(
        tmp_path / "images",
        rate=100.0,
        loop=False,
        image_qos=EVERY_FRAME,
        frame_id="wrist",
        calibration=write_calibration(tmp_path / "camera.yaml"),
    )
    received, infos = camera.listen(Image, "image_raw"), camera.listen(CameraInfo, "camera_info")
    camera.spin_until(lambda: len(received) >= 30 and len(infos) >= 30)
    for message, image in zip(received, images, strict=True):
        np.testing.assert_array_equal(read_image(message), image)
    stamps = [stamp_ns(m.header.stamp) for m in received]
    assert begin < stamps[0]
    assert stamps == sorted(set(stamps))
    assert stamps == [stamp_ns(m.header.stamp) for m in infos]
    assert {m.header.frame_id for m in received + infos} == {"wrist"}
    info = infos[0]
    assert (info.width, info.height, info.distortion_model) == (64, 48, "plumb_bob")
    for entry, name in (
        (info.k, "camera_matrix"),
        (info.d, "distortion_coefficients"),
        (info.r, "rectification_matrix"),
        (info.p, "projection_matrix"),
    ):
        assert list(entry) == CALIBRATION[name]["data"]
    ended = camera.wait_for_status(WARN, "ended")
    assert values_of(ended)["published"] == "30"
    assert values_of(ended)["dropped"] == "0"


def test_a_looping_video_is_published_at_its_rate_with_jpeg_and_without_invented_intrinsics(
    start: Callable[..., Camera], tmp_path: Path
) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "a.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25.0, (64, 48))
    for index in range(10):
        writer.write(np.full((48, 64, 3), 20 * index, np.uint8))
    writer.release()
    camera = start(tmp_path / "a.avi", image_topic="color")
    images = camera.listen(Image, "color", "best_effort depth=2")
    jpegs = camera.listen(CompressedImage, "color/compressed", "best_effort depth=2")
    infos = camera.listen(CameraInfo, "camera_info", "best_effort depth=2")

    def both() -> set[int]:
        return {stamp_ns(m.header.stamp) for m in images} & {stamp_ns(m.header.stamp) for m in jpegs}

    camera.spin_until(lambda: len(both()) >= 5 and len(infos) > 0)
    raw = {stamp_ns(m.header.stamp): read_image(m).astype(int) for m in images}
    for message in jpegs:
        if stamp_ns(message.header.stamp) in raw:
            difference = read_compressed(message) - raw[stamp_ns(message.header.stamp)]
            assert np.abs(difference).max() <= 4
    assert not any(infos[0].k)
    assert (infos[0].width, infos[0].height) == (64, 48)
    camera.spin_until(lambda: bool(camera.diagnostics) and int(values_of(camera.diagnostics[-1])["published"]) > 50)
    values = values_of(camera.wait_for_status(OK, "Hz"))
    assert float(values["rate_hz"]) == pytest.approx(25.0, rel=0.1)
    assert values["wanted_rate_hz"] == "25.00"
    assert float(values["capture_to_publish_p50_ms"]) < 20


def test_a_corrupt_image_is_named_and_the_others_are_published(start: Callable[..., Camera], tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 3)
    (tmp_path / "images" / "1.png").write_bytes(b"damaged")
    camera = start(tmp_path / "images", rate=100.0, loop=False, image_qos=EVERY_FRAME)
    received = camera.listen(Image, "image_raw")
    camera.spin_until(lambda: len(received) >= 2)
    np.testing.assert_array_equal(read_image(received[1]), images[2])
    camera.spin_until(lambda: "images/1.png" in camera.said())


def test_with_simulated_time_images_are_stamped_by_the_clock_topic(
    start: Callable[..., Camera], ros: tuple[Node, SingleThreadedExecutor], tmp_path: Path
) -> None:
    write_images(tmp_path / "images", 3)
    clock = ros[0].create_publisher(Clock, "/clock", 10)
    camera = start(tmp_path / "images", rate=50.0, use_sim_time="true")
    received = camera.listen(Image, "image_raw", "best_effort depth=2")

    def stamped() -> bool:
        clock.publish(Clock(clock=Time(sec=1234)))
        return any(stamp_ns(m.header.stamp) == 1234 * 10**9 for m in received)

    camera.spin_until(stamped)
    ros[0].destroy_publisher(clock)


def test_the_jpeg_quality_can_change_while_the_camera_runs_and_the_source_cannot(
    start: Callable[..., Camera], tmp_path: Path
) -> None:
    write_images(tmp_path / "images", 1)
    camera = start(tmp_path / "images", rate=50.0)
    jpegs = camera.listen(CompressedImage, "image_raw/compressed", "best_effort depth=2")
    camera.spin_until(lambda: len(jpegs) > 0)
    large = len(jpegs[0].data)
    results = camera.set_parameters(jpeg_quality=10, source="elsewhere")
    assert [r.successful for r in results] == [True, False]
    camera.spin_until(lambda: len(jpegs[-1].data) < large / 2)


# ---------------------------------------------------------------------- sources that go and come


def test_a_stream_that_drops_is_reopened_and_published_again(start: Callable[..., Camera], stream: Stream) -> None:
    stream.burst = 20
    camera = start(stream.url, reconnect_delay=0.2, diagnostics_period=0.1)
    received = camera.listen(Image, "image_raw", "best_effort depth=2")
    camera.wait_for_status(ERROR, "delivers no more frames")
    stream.burst = 1_000_000
    camera.wait_for_status(OK)
    before = len(received)
    camera.spin_until(lambda: len(received) >= before + 5)
    assert int(values_of(camera.wait_for_status(OK))["reopened"]) >= 1
    assert camera.end() == 0


def test_a_stream_that_falls_silent_is_reopened_after_the_read_timeout(
    start: Callable[..., Camera], stream: Stream
) -> None:
    stream.burst, stream.silent = 20, True
    camera = start(stream.url, read_timeout=0.5, reconnect_delay=0.1, diagnostics_period=0.1)
    camera.wait_for_status(ERROR)
    stream.burst = 1_000_000
    camera.wait_for_status(OK)
    assert stream.connections >= 2


def test_a_device_that_is_not_there_is_an_error_in_diagnostics_and_sigterm_still_ends_orderly(
    start: Callable[..., Camera],
) -> None:
    camera = start("/dev/video97", diagnostics_period=0.1)
    assert "'/dev/video97' is not there" in camera.wait_for_status(ERROR).message
    assert camera.end() == 0


def test_a_camera_slower_than_wanted_is_a_warning(start: Callable[..., Camera], stream: Stream) -> None:
    camera = start(stream.url, rate=100.0, diagnostics_period=0.2)
    assert "instead of 100.0 Hz" in camera.wait_for_status(WARN, "Hz").message


def test_a_stream_of_another_size_than_its_calibration_has_no_intrinsics(
    start: Callable[..., Camera], stream: Stream, tmp_path: Path
) -> None:
    path = write_calibration(tmp_path / "camera.yaml", image_width=640)
    camera = start(stream.url, calibration=path, diagnostics_period=0.2)
    infos = camera.listen(CameraInfo, "camera_info", "best_effort depth=2")
    camera.wait_for_status(WARN, "calibration for 640 x 48")
    camera.spin_until(lambda: len(infos) > 0)
    assert not any(infos[0].k)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_playing_camera_with_status_0(
    start: Callable[..., Camera], tmp_path: Path, number: int
) -> None:
    write_images(tmp_path / "images", 3)
    camera = start(tmp_path / "images", rate=50.0)
    camera.wait_for_status(OK)
    assert camera.end(number) == 0, camera.said()


# ---------------------------------------------------------------------- configuration


def test_a_missing_file_ends_with_status_2_and_one_line_naming_it(start: Callable[..., Camera]) -> None:
    camera = start("/nowhere/gone.mp4")
    assert camera.process.wait(LIMIT) == 2
    lines = camera.said().strip().splitlines()
    assert len(lines) == 1
    assert "/nowhere/gone.mp4" in lines[0]


def test_a_name_that_is_no_topic_ends_with_status_2_and_no_traceback(
    start: Callable[..., Camera], tmp_path: Path
) -> None:
    write_images(tmp_path / "images", 1)
    camera = start(tmp_path / "images", rate=10.0, image_topic="left image")
    assert camera.process.wait(LIMIT) == 2
    assert "left image" in camera.said()
    assert "Traceback" not in camera.said()


def test_a_calibration_of_another_size_than_the_files_ends_with_status_2(
    start: Callable[..., Camera], tmp_path: Path
) -> None:
    write_images(tmp_path / "images", 1)
    path = write_calibration(tmp_path / "camera.yaml", image_width=640, image_height=480)
    camera = start(tmp_path / "images", rate=10.0, calibration=path)
    assert camera.process.wait(LIMIT) == 2
    assert "is for 640 x 480 pixels, but images are published with 64 x 48" in camera.said()


@pytest.mark.parametrize(
    ("changes", "entry"),
    [
        ({"image_width": 0}, "image_width"),
        ({"image_height": "48"}, "image_height"),
        ({"distortion_model": "fisheye"}, "distortion_model"),
        ({"camera_matrix": None}, "camera_matrix"),
        ({"camera_matrix": {"rows": 3, "cols": 3, "data": [0.0] * 9}}, "camera_matrix"),
        ({"camera_matrix": {"rows": 3, "cols": 3, "data": [1.0] * 8}}, "camera_matrix"),
        ({"distortion_coefficients": {"rows": 1, "cols": 3, "data": [0.0] * 3}}, "distortion_coefficients"),
        ({"rectification_matrix": {"rows": 3, "cols": 3, "data": [float("nan")] * 9}}, "rectification_matrix"),
        ({"projection_matrix": {"rows": 3, "cols": 3, "data": [1.0] * 9}}, "projection_matrix"),
    ],
)
def test_a_wrong_calibration_is_refused_by_file_and_entry(
    tmp_path: Path, changes: dict[str, object], entry: str
) -> None:
    path = write_calibration(tmp_path / "camera.yaml", **changes)
    with pytest.raises(ConfigurationError, match=rf"camera\.yaml': {entry} must be"):
        read_calibration(str(path))


@pytest.mark.parametrize("text", [None, "- a list", "%YAML:1.0\na: !!opencv-matrix {}", "a: [", "\xff\xfe"])
def test_a_calibration_that_is_missing_or_no_ros_yaml_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "camera.yaml"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"camera\.yaml"):
        read_calibration(str(path))


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"jpeg_quality": 0}, "jpeg_quality"),
        ({"min_rate_ratio": 1.5}, "min_rate_ratio"),
        ({"rate": 0.1}, "rate_window"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(values: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigurationError, match=word):
        CameraParameters(**values)


def test_the_measured_rate_sinks_when_frames_stay_away() -> None:
    meter = RateMeter(5.0)
    for index in range(11):
        meter.add(index / 10)
    assert meter.rate(1.0) == pytest.approx(10.0)
    assert meter.rate(4.0) == pytest.approx(11 / 4)
    assert np.isnan(meter.rate(60.0))
