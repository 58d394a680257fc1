"""Sources and the capture thread: real files and sockets; a scripted live source where the timing must be exact."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashvla_ros.capture import Capture, Frame, Pace, State
from flashvla_ros.errors import ConfigurationError
from flashvla_ros.sources import (
    CaptureParameters,
    CorruptImage,
    FolderSource,
    Source,
    SourceEnded,
    SourceLost,
    first_image,
    make_source,
)

LIMIT = 10.0  # s


def numbered(index: int, width: int = 64, height: int = 48) -> np.ndarray:
    """(H, W, 3) uint8 RGB whose grey value says its index, even after JPEG."""
    return np.full((height, width, 3), 4 * index, np.uint8)


def index_of(image: np.ndarray) -> int:
    return round(float(image.mean()) / 4)


def write_video(path: Path, count: int, rate: float = 100.0) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), rate, (64, 48))
    for index in range(count):
        writer.write(numbered(index))
    writer.release()
    return path


def write_images(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        cv2.imwrite(str(folder / f"frame_{index}.png"), numbered(index))
    return folder


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.002)


class ScriptedCamera(Source):
    """A live source that delivers when the test says so, and drops when the test says so."""

    live, name = True, "scripted"

    def __init__(self) -> None:
        self.opened: list[float] = []
        self.allowed = self.grabbed = 0
        self.there = True
        self.error: Exception | None = None

    def open(self) -> None:
        self.opened.append(time.monotonic())
        if not self.there:
            raise SourceLost("not there")

    def grab(self) -> None:
        deadline = time.monotonic() + LIMIT
        while self.grabbed >= self.allowed and self.there and self.error is None and time.monotonic() < deadline:
            time.sleep(0.001)
        if self.error is not None:
            raise self.error
        if not self.there:
            raise SourceLost("unplugged")
        self.grabbed += 1

    def retrieve(self) -> np.ndarray:
        return numbered(self.grabbed)


Start = Callable[..., Capture]


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[Capture] = []
    cameras: list[ScriptedCamera] = []

    def make(source: str | Path | Source, clock: Callable[[], int] = time.time_ns, **values: object) -> Capture:
        name = "scripted" if isinstance(source, Source) else str(source)
        params = CaptureParameters(source=name, **values)
        capture = Capture(
            source if isinstance(source, Source) else make_source(params),
            params,
            clock,
            lambda: None,
            logging.getLogger("camera"),
        )
        running.append(capture)
        if isinstance(source, ScriptedCamera):
            cameras.append(source)
        capture.start()
        return capture

    yield make
    for camera in cameras:
        camera.there = False  # a grab that waits returns
    for capture in running:
        capture.stop()


def play(capture: Capture, count: int | None = None) -> list[Frame]:
    """Takes `count` frames, or every frame until the source ended."""
    frames: list[Frame] = []

    def done() -> bool:
        ended = capture.state is State.ENDED
        frame = capture.take()
        if frame is not None:
            frames.append(frame)
        return len(frames) == count if count is not None else ended and frame is None

    until(done)
    return frames


# ---------------------------------------------------------------------- files and folders


def test_a_folder_is_played_in_the_order_of_its_numbers_with_exact_pixels(start: Start, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (5, 7, 3), np.uint8) for _ in range(12)]
    for index, image in enumerate(images):
        cv2.imwrite(str(tmp_path / f"frame_{index}.png"), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    frames = play(start(tmp_path, rate=500.0, loop=False))
    assert len(frames) == 12
    for frame, image in zip(frames, images, strict=True):
        np.testing.assert_array_equal(frame.image, image)


def test_a_video_is_played_at_the_rate_and_every_frame_comes_once_in_order(start: Start, tmp_path: Path) -> None:
    frames = play(start(write_video(tmp_path / "a.avi", 20), rate=50.0, loop=False))
    assert [index_of(f.image) for f in frames] == list(range(20))
    assert frames[-1].captured - frames[0].captured >= 19 / 50 - 0.02


def test_a_video_without_a_given_rate_is_played_at_its_own(start: Start, tmp_path: Path) -> None:
    capture = start(write_video(tmp_path / "a.avi", 5, rate=25.0), loop=False)
    frames = play(capture)
    assert capture.wanted_rate == 25.0
    assert frames[-1].captured - frames[0].captured >= 4 / 25 - 0.04


def test_a_slow_consumer_of_a_file_misses_no_frame(start: Start, tmp_path: Path) -> None:
    capture = start(write_video(tmp_path / "a.avi", 10), rate=1000.0, loop=False)
    indices = []
    for _ in range(10):
        deadline = time.monotonic() + 0.02
        until(lambda limit=deadline: time.monotonic() > limit)
        indices.append(index_of(play(capture, 1)[0].image))
    assert indices == list(range(10))
    assert capture.counts["dropped"] == 0


def test_a_looping_video_starts_again_at_its_first_frame(start: Start, tmp_path: Path) -> None:
    capture = start(write_video(tmp_path / "a.avi", 3), rate=500.0)
    assert [index_of(f.image) for f in play(capture, 8)] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert capture.counts["loops"] >= 2


def test_a_source_that_does_not_loop_says_that_it_ended(start: Start, tmp_path: Path) -> None:
    capture = start(write_images(tmp_path, 2), rate=500.0, loop=False)
    play(capture)
    assert capture.state is State.ENDED
    assert "played to its end" in capture.reason


def test_a_truncated_video_says_how_many_frames_are_missing(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    video = write_video(tmp_path / "cut.avi", 40)
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    capture = start(video, rate=1000.0, loop=False)
    frames = play(capture)
    assert 0 < len(frames) < 40
    assert f"cut.avi' ended after {len(frames)} of 40 frames" in capture.reason
    assert capture.reason in caplog.text


@pytest.mark.parametrize("damage", ["cut.png", "cut.jpg", "empty.png", "text.png"])
def test_a_corrupt_image_is_reported_by_name_and_skipped(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    write_images(tmp_path, 2)
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    whole = cv2.imencode(Path(damage).suffix, noise)[1].tobytes()
    (tmp_path / f"frame_0_{damage}").write_bytes(
        {"cut": whole[: len(whole) * 2 // 3], "empty": b"", "text": b"no image at all"}[damage.split(".")[0]]
    )
    capture = start(tmp_path, rate=500.0, loop=False)
    assert [index_of(f.image) for f in play(capture)] == [0, 1]
    assert capture.counts["corrupt"] == 1
    assert f"frame_0_{damage}" in caplog.text


def test_images_are_resized_to_the_published_size(start: Start, tmp_path: Path) -> None:
    capture = start(write_images(tmp_path, 1), rate=500.0, width=32, height=16)
    assert play(capture, 1)[0].image.shape == (16, 32, 3)


def test_a_folder_deleted_while_it_loops_is_lost_and_found_again(start: Start, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 2)
    capture = start(folder, rate=500.0, reconnect_delay=0.01)
    play(capture, 2)
    folder.rename(tmp_path / "away")
    until(lambda: capture.take() is None and capture.state is State.DISCONNECTED)
    (tmp_path / "away").rename(folder)
    play(capture, 2)
    assert capture.counts["reopened"] == 1


# ---------------------------------------------------------------------- live sources


def test_a_slow_consumer_of_a_live_source_sees_only_the_newest_frame(start: Start) -> None:
    camera = ScriptedCamera()
    capture = start(camera)
    camera.allowed = 5
    until(lambda: capture.counts["captured"] == 5)
    assert index_of(play(capture, 1)[0].image) == 5
    assert capture.take() is None
    assert capture.counts["dropped"] == 4


def test_a_frame_is_stamped_by_the_given_clock_when_it_was_grabbed(start: Start) -> None:
    camera = ScriptedCamera()
    capture = start(camera, clock=lambda: 100 + camera.grabbed)
    camera.allowed = 1
    assert play(capture, 1)[0].stamp_ns == 101


def test_a_dropped_source_is_reopened(start: Start) -> None:
    camera = ScriptedCamera()
    capture = start(camera, reconnect_delay=0.01)
    camera.allowed = 1
    play(capture, 1)
    camera.there = False
    until(lambda: capture.state is State.DISCONNECTED)
    assert capture.reason in ("unplugged", "not there")
    camera.there, camera.allowed = True, 2
    play(capture, 1)
    assert capture.state is State.CONNECTED
    assert capture.counts["reopened"] == 1


def test_the_wait_between_attempts_doubles_up_to_its_limit(start: Start) -> None:
    camera = ScriptedCamera()
    camera.there = False
    start(camera, reconnect_delay=0.02, reconnect_max_delay=0.08)
    until(lambda: len(camera.opened) == 6)
    waits = np.diff(camera.opened)
    assert (waits >= [0.02, 0.04, 0.08, 0.08, 0.08]).all()
    assert waits[-1] < 0.3  # 0.32 if it went on doubling


def test_a_source_that_is_not_there_is_told_once_not_at_every_attempt(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    camera = ScriptedCamera()
    camera.there = False
    start(camera, reconnect_delay=0.01, reconnect_max_delay=0.01)
    until(lambda: len(camera.opened) >= 5)
    assert caplog.text.count("disconnected: not there") == 1


def test_a_silent_stream_counts_as_not_there_after_its_time_out(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        capture = start(f"http://127.0.0.1:{silent.getsockname()[1]}/video", open_timeout=0.5)
        until(lambda: capture.state is State.DISCONNECTED)
        assert time.monotonic() - begin >= 0.5
        assert "cannot be opened" in capture.reason


def test_a_device_that_is_not_there_is_waited_for(start: Start) -> None:
    capture = start("/dev/video97", reconnect_delay=0.01)
    until(lambda: capture.state is State.DISCONNECTED)
    assert "'/dev/video97' is not there" in capture.reason


def test_an_unexpected_error_of_the_thread_reaches_the_consumer(start: Start) -> None:
    camera = ScriptedCamera()
    capture = start(camera)
    camera.error = ZeroDivisionError("a bug")

    def raised() -> bool:
        try:
            capture.take()
        except ZeroDivisionError:
            return True
        return False

    until(raised)


def test_stop_does_not_wait_for_a_consumer(start: Start, tmp_path: Path) -> None:
    capture = start(write_images(tmp_path, 3), rate=500.0)
    until(lambda: capture.counts["captured"] == 1)
    begin = time.monotonic()
    capture.stop()
    assert time.monotonic() - begin < 1.0


@given(camera=st.floats(1, 120), wanted=st.floats(1, 120))
def test_thinning_keeps_the_wanted_rate(camera: float, wanted: float) -> None:
    pace, kept = Pace(wanted), 0
    for index in range(int(20 * camera)):
        now = index / camera
        if pace.remaining(now) <= 0.5 * pace.period:
            pace.advance(now)
            kept += 1
    assert kept == pytest.approx(20 * min(camera, wanted), abs=2)


def test_a_delay_is_not_followed_by_a_burst() -> None:
    pace = Pace(10.0)
    pace.advance(0.0)
    pace.advance(5.0)
    assert pace.remaining(5.0) == pytest.approx(0.1)


# ---------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"source": " "}, "source"),
        ({"rate": -1.0}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"width": 640}, "height"),
        ({"fourcc": "MJPEG"}, "fourcc"),
        ({"read_timeout": 0.0}, "read_timeout"),
        ({"reconnect_delay": 20.0}, "reconnect_max_delay"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(values: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigurationError, match=word):
        CaptureParameters(**values)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"gone\.mp4"):
        make_source(CaptureParameters(source=str(tmp_path / "gone.mp4")))


def refused(path: Path, **values: object) -> str:
    params = CaptureParameters(source=str(path), **values)
    with pytest.raises(ConfigurationError) as caught:
        first_image(make_source(params), params)
    return str(caught.value)


def test_a_file_that_is_no_video_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.avi"
    path.write_text("no video")
    assert "notes.avi' cannot be opened as video" in refused(path)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    assert "has no image" in refused(tmp_path, rate=10.0)


def test_a_folder_of_corrupt_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    assert "no image that can be decoded" in refused(tmp_path, rate=10.0)


def test_a_folder_without_a_rate_is_refused(tmp_path: Path) -> None:
    assert "parameter 'rate'" in refused(write_images(tmp_path, 1))


def test_a_file_url_is_a_file(tmp_path: Path) -> None:
    params = CaptureParameters(source=f"file://{write_images(tmp_path, 1)}", rate=10.0)
    assert first_image(make_source(params), params).shape == (48, 64, 3)


def test_a_number_names_a_device() -> None:
    assert make_source(CaptureParameters(source="3")).name == "/dev/video3"


def test_a_password_in_a_url_is_not_told() -> None:
    assert make_source(CaptureParameters(source="rtsp://me:secret@cam/1")).name == "rtsp://***@cam/1"


def test_an_image_that_opencv_refuses_is_corrupt(tmp_path: Path) -> None:
    # A PPM header that promises more pixels than OpenCV allows.
    (tmp_path / "huge.ppm").write_bytes(b"P6\n2000000 2000000\n255\n")
    source = FolderSource(tmp_path)
    source.open()
    source.grab()
    with pytest.raises(CorruptImage, match="huge"):
        source.retrieve()
    with pytest.raises(SourceEnded):
        source.grab()
