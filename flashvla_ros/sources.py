"""Where images come from: a device, a stream, a video file or a folder of images. Without ROS."""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from flashvla_ros.errors import ConfigurationError
from flashvla_ros.fields import param, require, require_non_negative, require_positive

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


class SourceLost(RuntimeError):
    """The source cannot be opened or delivers nothing more: another try may succeed."""


class SourceEnded(Exception):
    """A file or folder was read to its end; the text, if any, says what was wrong with it."""


class CorruptImage(ValueError):
    """One image cannot be decoded; the ones after it may be fine."""


def decode_image(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a JPEG, PNG or whatever else OpenCV reads. Raises CorruptImage: why not."""
    # Older decoders fill the missing part of a cut JPEG with grey. Within JPEG data, neither marker can occur.
    cut = data.startswith(b"\xff\xd8") and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data and not cut else None
    except cv2.error as error:
        raise CorruptImage(f"({len(data)} bytes) is refused by OpenCV: {error.err}") from error
    if image is None:
        raise CorruptImage(f"({len(data)} bytes) cannot be decoded: it is cut or no image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


@dataclass(frozen=True)
class CaptureParameters:
    source: str = param("0", "device (0 or /dev/video0), video file, folder of images, or stream (rtsp://, http://)")
    rate: float = param(
        0.0,
        "Hz; a device or stream is thinned to it, a file or folder is played at it; 0 = the "
        "source's own, which a folder does not have",
    )
    width: int = param(0, "pixels of the published image, asked of a device and else resized to; 0 = the source's")
    height: int = param(0, "pixels of the published image, asked of a device and else resized to; 0 = the source's")
    fourcc: str = param(
        "",
        "pixel format asked of a device, such as MJPG (USB cameras need it for large images at a "
        "full rate); empty = the device's",
    )
    loop: bool = param(True, "a file or folder starts again at its end; false = the node then stops publishing")
    open_timeout: float = param(5.0, "s; a stream that cannot be opened within this counts as not there")
    read_timeout: float = param(
        2.0,
        "s; a device or stream without a frame for this long counts as dropped and is "
        "reopened (a device: in whole seconds, rounded up)",
    )
    reconnect_delay: float = param(0.5, "s before the first attempt to reopen; doubles with each failure")
    reconnect_max_delay: float = param(10.0, "s; the longest wait between two attempts")

    def __post_init__(self) -> None:
        require(bool(self.source.strip()), "source", self.source, "a device, a path or a URL")
        require_non_negative(self, "rate", "width", "height")
        require(
            (self.width > 0) == (self.height > 0),
            "width",
            self.width,
            f"given together with 'height' ({self.height}): both, or both 0",
        )
        require(len(self.fourcc) in (0, 4), "fourcc", self.fourcc, "four characters or empty")
        require_positive(self, "open_timeout", "read_timeout", "reconnect_delay", "reconnect_max_delay")
        require(
            self.reconnect_max_delay >= self.reconnect_delay,
            "reconnect_max_delay",
            self.reconnect_max_delay,
            f"at least 'reconnect_delay' ({self.reconnect_delay})",
        )


class Source(ABC):
    """One place that images come from. Used by one thread at a time.

    live: frames come by themselves and are lost unless grabbed. name: for people, without password.
    rate: Hz as the source itself declares it, None where it does not; known once opened.
    """

    live: bool
    name: str
    rate: float | None = None

    @abstractmethod
    def open(self) -> None:
        """Starts at the beginning. Raises SourceLost."""

    @abstractmethod
    def grab(self) -> None:
        """Waits for the next frame, without decoding it. Raises SourceLost or SourceEnded."""

    @abstractmethod
    def retrieve(self) -> np.ndarray:
        """The grabbed frame, (H, W, 3) uint8 RGB. Raises SourceLost or CorruptImage."""

    def close(self) -> None:  # noqa: B027 - a source that holds nothing open has nothing to close
        """May be opened again."""


class VideoSource(Source):
    """Whatever cv2.VideoCapture opens. address: "/dev/video0", a URL or a file; files alone are not live."""

    def __init__(self, address: str, params: CaptureParameters) -> None:
        self._address, self._params = address, params
        self._device = address.startswith("/dev/")
        self._stream = "://" in address
        self.live = self._device or self._stream
        self.name = re.sub(r"//[^/@]*@", "//***@", address)
        self._capture = cv2.VideoCapture()
        self._grabbed = 0

    def open(self) -> None:
        # Checked first, because OpenCV does not tell a missing file from a damaged one.
        if not self._stream and not os.path.exists(self._address):
            raise SourceLost(f"'{self.name}' is not there")
        self._capture = cv2.VideoCapture(self._address, *self._backend())
        if not self._capture.isOpened():
            raise SourceLost(f"'{self.name}' cannot be opened as video: not reachable, in use or not a video")
        if self._device:
            self._ask_device()
        self._grabbed = 0
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        # For a stream without a declared rate (Motion JPEG) FFmpeg makes up 25 Hz.
        self.rate = rate if not self._stream and math.isfinite(rate) and 0 < rate <= 1000 else None

    def _backend(self) -> tuple[int, list[int]]:
        if self._device:
            # V4L2 knows no time-out per capture: OpenCV reads this variable at the process's first wait.
            os.environ["OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT"] = str(math.ceil(self._params.read_timeout))
            return cv2.CAP_V4L2, []
        if not self._stream:
            return cv2.CAP_FFMPEG, []
        options = [
            cv2.CAP_PROP_OPEN_TIMEOUT_MSEC,
            math.ceil(1e3 * self._params.open_timeout),
            cv2.CAP_PROP_READ_TIMEOUT_MSEC,
            math.ceil(1e3 * self._params.read_timeout),
        ]
        if hasattr(cv2, "CAP_PROP_N_THREADS"):
            # Every further decoder thread holds one more frame back.
            options += [cv2.CAP_PROP_N_THREADS, 1]
        return cv2.CAP_FFMPEG, options

    def _ask_device(self) -> None:
        wishes = {
            cv2.CAP_PROP_FRAME_WIDTH: self._params.width,
            cv2.CAP_PROP_FRAME_HEIGHT: self._params.height,
            cv2.CAP_PROP_FPS: self._params.rate,
        }
        if self._params.fourcc:
            wishes = {cv2.CAP_PROP_FOURCC: cv2.VideoWriter.fourcc(*self._params.fourcc)} | wishes
        for key, value in wishes.items():
            if value:
                self._capture.set(key, value)

    def grab(self) -> None:
        if self._capture.grab():
            self._grabbed += 1
        elif self.live:
            raise SourceLost(f"'{self.name}' delivers no more frames, or none within {self._params.read_timeout} s")
        else:
            expected = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
            # Containers without an index only estimate their length, so a few frames fewer are no sign of damage.
            damaged = self._grabbed < 0.98 * expected - 1
            raise SourceEnded(
                f"'{self.name}' ended after {self._grabbed} of {expected} frames: it is truncated or damaged"
                if damaged
                else ""
            )

    def retrieve(self) -> np.ndarray:
        ok, image = self._capture.retrieve()
        if not ok or image is None:
            raise CorruptImage(f"frame {self._grabbed} of '{self.name}' cannot be decoded")
        try:
            return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB if image.ndim == 2 else cv2.COLOR_BGR2RGB)
        except cv2.error as error:
            raise CorruptImage(
                f"frame {self._grabbed} of '{self.name}' has shape {image.shape}: it is neither grey nor BGR"
            ) from error

    def close(self) -> None:
        self._capture.release()


def _by_number(path: Path) -> tuple[list[tuple[int, str]], str]:
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name


class FolderSource(Source):
    """The images of one folder, by name; numbers in names count as numbers (frame_2 before frame_10)."""

    live = False

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self._folder = folder
        self._waiting: deque[Path] = deque()
        self._path = folder

    def open(self) -> None:
        try:
            images = [p for p in self._folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES]
        except OSError as error:
            raise SourceLost(f"folder '{self.name}' cannot be read: {error.strerror}") from error
        if not images:
            raise SourceLost(f"folder '{self.name}' has no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
        self._waiting = deque(sorted(images, key=_by_number))

    def grab(self) -> None:
        if not self._waiting:
            raise SourceEnded
        self._path = self._waiting.popleft()

    def retrieve(self) -> np.ndarray:
        try:
            data = self._path.read_bytes()
        except OSError as error:
            raise CorruptImage(f"image '{self._path}' cannot be read: {error.strerror}") from error
        try:
            return decode_image(data)
        except CorruptImage as error:
            raise CorruptImage(f"image '{self._path}' {error}") from error


def make_source(params: CaptureParameters) -> Source:
    """The source that `params.source` names. Raises ConfigurationError: a file or folder that is not there."""
    text = params.source.strip().removeprefix("file://")
    if text.isdecimal():
        return VideoSource(f"/dev/video{text}", params)
    if text.startswith("/dev/") or "://" in text:
        return VideoSource(text, params)
    path = Path(text).expanduser()
    if path.is_dir():
        return FolderSource(path)
    require(path.is_file(), "source", params.source, "a device, a URL, or a file or folder that exists")
    return VideoSource(str(path), params)


def first_image(source: Source, params: CaptureParameters) -> np.ndarray:
    """The first good image of a file or folder, (H, W, 3) uint8 RGB, of the published size; the source is closed after.

    Raises ConfigurationError: nothing can be read, or neither `rate` nor the source says how fast to play it.
    """
    try:
        source.open()
        while True:
            source.grab()
            try:
                image = source.retrieve()
                break
            except CorruptImage:
                continue  # reported when it is played
    except SourceLost as error:
        raise ConfigurationError(f"parameter 'source': {error}") from error
    except SourceEnded as error:
        raise ConfigurationError(f"parameter 'source': '{source.name}' has no image that can be decoded") from error
    finally:
        source.close()
    require(
        params.rate > 0 or source.rate is not None,
        "rate",
        params.rate,
        f"above 0 (Hz), because '{source.name}' does not say its own rate",
    )
    return fit(image, params)


def fit(image: np.ndarray, params: CaptureParameters) -> np.ndarray:
    """(H, W, 3) resized to `width` x `height` where these are given; the aspect ratio follows them."""
    size = (params.width, params.height)
    if 0 in size or image.shape[1::-1] == size:
        return image
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)
