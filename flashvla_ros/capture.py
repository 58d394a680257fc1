"""A thread that reads a source and keeps only its newest frame. Without ROS."""

from __future__ import annotations

import enum
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flashvla_ros.sources import CaptureParameters, CorruptImage, Source, SourceEnded, SourceLost, fit

STOP_LIMIT = 6.0  # s that stop() waits for a read that blocks; longer than the default open_timeout


class Logger(Protocol):
    """What logging.Logger and rclpy's logger have in common."""

    def info(self, message: str, /) -> object: ...
    def warning(self, message: str, /) -> object: ...
    def error(self, message: str, /) -> object: ...


class State(enum.Enum):
    CONNECTING = "connecting"
    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    ENDED = "ended"


@dataclass(frozen=True)
class Frame:
    """image: (H, W, 3) uint8 RGB. stamp_ns: the clock when it was captured. captured: the same instant, monotonic s."""

    image: np.ndarray
    stamp_ns: int
    captured: float


class Pace:
    """Instants 1/rate apart. A delay beyond one period moves those after it, so that no burst follows. rate: Hz."""

    def __init__(self, rate: float) -> None:
        self.period = 1.0 / rate if rate else 0.0
        self._next = -math.inf

    def remaining(self, now: float) -> float:
        """s until the next instant; negative once it passed."""
        return self._next - now

    def advance(self, now: float) -> None:
        late = now - self._next >= self.period
        self._next = (now if late else self._next) + self.period


class Capture:
    """Reads a source in a thread of its own, and reopens it when it drops.

    A live source is drained as fast as it delivers and the newest frame replaces the one before it; of a file or
    folder every frame waits until the one before it was taken. clock: ns, called when a frame was read.
    notify: called from the thread when `take` has something, and when `state` changed. logger: where changes are told.
    """

    def __init__(
        self,
        source: Source,
        params: CaptureParameters,
        clock: Callable[[], int],
        notify: Callable[[], None],
        logger: Logger,
    ) -> None:
        self._source, self._params, self._clock, self._notify = source, params, clock, notify
        self._logger = logger
        self._pace = Pace(params.rate)
        self._changed = threading.Condition()
        self._frame: Frame | None = None
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self.state, self.reason = State.CONNECTING, f"opening '{source.name}'"
        self.last_grab = time.monotonic()
        self.counts = {"captured": 0, "dropped": 0, "corrupt": 0, "reopened": 0, "loops": 0}

    def start(self) -> None:
        self._thread.start()

    def take(self) -> Frame | None:
        """The newest frame, once. Raises whatever ended the thread."""
        with self._changed:
            if self._failure is not None:
                raise self._failure
            frame, self._frame = self._frame, None
            self._changed.notify()
            return frame

    def stop(self) -> None:
        """Ends the thread and closes the source; a read that blocks longer than STOP_LIMIT is left behind."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(STOP_LIMIT)
        if self._thread.is_alive():
            self._logger.warning(f"'{self._source.name}' still blocks after {STOP_LIMIT} s: left to the process's end")

    @property
    def source_name(self) -> str:
        return self._source.name

    @property
    def wanted_rate(self) -> float | None:
        """Hz that frames should come at; None where neither `rate` nor the source says."""
        return self._params.rate or self._source.rate

    def silent_for(self) -> float:
        """s since a live source delivered its newest frame; 0 for a file or folder."""
        return time.monotonic() - self.last_grab if self._source.live else 0.0

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # take() raises it in the thread that can end the process
            self._failure = error
            self._tell()

    def _serve(self) -> None:
        delay = self._params.reconnect_delay
        while not self._stopping:
            before = self.counts["captured"]
            try:
                self._play()
            except SourceLost as error:
                if self.counts["captured"] > before:
                    delay = self._params.reconnect_delay
                self._enter(State.DISCONNECTED, str(error))
                self._pause(delay)
                delay = min(2 * delay, self._params.reconnect_max_delay)
            except SourceEnded as ended:
                self._at_end(str(ended), self.counts["captured"] > before)
            finally:
                self._source.close()

    def _play(self) -> None:
        self._source.open()
        if not self._source.live and self.wanted_rate:
            self._pace.period = 1.0 / self.wanted_rate
        while not self._stopping:
            self._source.grab()
            now = self.last_grab = time.monotonic()
            stamp = self._clock()
            # Half a period of tolerance: a camera's jitter must not cost every second frame.
            if self._source.live and self._pace.remaining(now) > 0.5 * self._pace.period:
                continue
            try:
                image = fit(self._source.retrieve(), self._params)
            except CorruptImage as error:
                self.counts["corrupt"] += 1
                if not self.counts["loops"]:  # each file once, not at every pass
                    self._logger.warning(f"skipped: {error}")
                continue
            if not self._source.live:
                self._pause(self._pace.remaining(now))
                now, stamp = time.monotonic(), self._clock()
            self._pace.advance(now)
            self._enter(State.CONNECTED, f"reading '{self._source.name}'")
            self._offer(Frame(image, stamp, now))

    def _offer(self, frame: Frame) -> None:
        with self._changed:
            if not self._source.live:
                self._changed.wait_for(lambda: self._frame is None or self._stopping)
            elif self._frame is not None:
                self.counts["dropped"] += 1
            self.counts["captured"] += 1
            self._frame = frame
        self._tell()

    def _at_end(self, damage: str, any_frame: bool) -> None:
        if damage:
            self._logger.warning(damage)
        if not any_frame and self._params.loop:
            self._enter(State.DISCONNECTED, f"'{self._source.name}' has no image that can be decoded any more")
            self._pause(self._params.reconnect_max_delay)
        elif self._params.loop:
            self.counts["loops"] += 1
        else:
            self._enter(State.ENDED, damage or f"'{self._source.name}' was played to its end")
            self._stopping = True

    def _enter(self, state: State, reason: str) -> None:
        if (state, reason) == (self.state, self.reason):
            return
        if state is State.CONNECTED and self.state is State.DISCONNECTED and self.counts["captured"]:
            self.counts["reopened"] += 1
        self.state, self.reason = state, reason
        if state is State.DISCONNECTED:
            self._logger.error(f"{state.value}: {reason}")
        else:  # a line of its own: rclpy's logger keeps one severity per calling line
            self._logger.info(f"{state.value}: {reason}")
        self._tell()

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping, timeout=max(0.0, seconds))

    def _tell(self) -> None:
        if not self._stopping:
            self._notify()
