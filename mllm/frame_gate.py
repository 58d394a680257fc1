"""Has something moved that should not have? A look at small grey images, for a robot that is about to act unseeing.

FlashVLA never looks at the frame on which it reuses an action; this gate does (our choice). The arm moves in every
frame, and in the wrist camera everything does, so a bare difference says little. But what the arm does next resembles
what it did just before: a place that changes much more than its surroundings did one frame earlier is a surprise.

On 96 states of LIBERO demonstrations (4 tasks, 128 pixels, both cameras, before the grasp), the target was moved by 2,
3 and 5 cm. At a threshold that 5 % of the undisturbed states exceed, the gate saw 94, 99 and 100 %. The bare difference
in the agentview camera, at the same rate, saw 5 % of 2 cm and 17 % of 5 cm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from mllm.errors import PolicyError
from mllm.policy import TokenLayout

CELLS = 16  # an image's cells, down and across: what is compared
PIXELS = 4  # of the small image, a cell's sides
MOTION = 2.0  # times the change around a cell one frame earlier: what is no surprise
AROUND = np.ones((3, 3), np.uint8)


class FrameGate:
    """Compares every frame with the one before it. layout: of the policy; None is all of every camera.

    Frames must be shown in order, none left out: a gap looks like a change, which is the safe side.
    """

    def __init__(self, layout: TokenLayout | None = None) -> None:
        self._layout = layout
        self.clear()

    def clear(self) -> None:
        """Forgets the frames, and which tokens were kept."""
        self._frames: np.ndarray | None = None
        self._changes: np.ndarray | None = None
        self._watched: np.ndarray | None = None

    def watch(self, kept: np.ndarray | None) -> None:
        """From now on only the cells of these visual tokens count; see `ActionStep.kept`."""
        layout = self._layout
        self._watched = None
        if kept is None or layout is None:
            return
        if len(kept) and not 0 <= kept[0] <= kept[-1] < layout.tokens:
            raise PolicyError(f"kept tokens {kept[0]} to {kept[-1]} do not fit the layout's {layout.tokens}")
        tokens = np.zeros(layout.tokens, bool)
        tokens[kept] = True
        grid = tokens.reshape(-1, layout.rows, layout.columns)
        if layout.mirror:
            grid = grid[:, :, ::-1]
        watched = touching(layout.rows) @ grid @ touching(layout.columns).T > 0
        self._watched = np.moveaxis(watched, 0, -1)

    def surprise(self, images: Mapping[str, np.ndarray]) -> float:
        """images: camera -> (H, W, 3) uint8 RGB, of this frame.

        Returns the largest of all watched cells' surprises, in grey levels from 0 to 255: by how much a cell's mean
        absolute change since the frame before exceeds `MOTION` times the largest one around it a frame earlier. 0 for
        the first two frames, of which nothing can be said; infinite where a camera is missing or there is none.
        """
        names = sorted(images) if self._layout is None else self._layout.cameras
        if not names or any(name not in images for name in names):
            self._frames = self._changes = None
            return float("inf")
        # Cameras as channels: one call for all of them.
        frames = np.stack([self._shrink(images[name]) for name in names], -1)
        before, self._frames = self._frames, frames
        if before is None or before.shape != frames.shape:
            self._changes = None
            return 0.0 if before is None else float("inf")
        changes = cell_means(frames, before)
        earlier, self._changes = self._changes, changes
        if earlier is None:
            return 0.0
        surprises = changes - np.float32(MOTION) * cv2.dilate(earlier, AROUND).reshape(changes.shape)
        if self._watched is not None:
            surprises = surprises[self._watched]
        return max(float(surprises.max(initial=0.0)), 0.0)

    def _shrink(self, image: np.ndarray) -> np.ndarray:
        if self._layout is not None and self._layout.area < 1:
            inset = (1 - self._layout.area**0.5) / 2
            rows, columns = (round(inset * side) for side in image.shape[:2])
            image = image[rows : image.shape[0] - rows, columns : image.shape[1] - columns]
        side = CELLS * PIXELS
        step = max(1, min(image.shape[:2]) // (2 * side))  # not every pixel of a large image
        image = np.ascontiguousarray(image[::step, ::step])
        small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
        return cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)


def cell_means(now: np.ndarray, then: np.ndarray) -> np.ndarray:
    """Small grey images, (side, side, C). Returns each cell's mean absolute difference, (CELLS, CELLS, C) float32."""
    means = cv2.resize(cv2.absdiff(now, then), (CELLS, CELLS), interpolation=cv2.INTER_AREA)
    return means.reshape(CELLS, CELLS, -1)


def touching(count: int) -> np.ndarray:
    """(CELLS, count) int64: 1 where a cell and one of `count` tokens along the same side share pixels."""
    cells, tokens = np.arange(CELLS)[:, None], np.arange(count)[None]
    return ((cells * count < (tokens + 1) * CELLS) & (tokens * CELLS < (cells + 1) * count)).astype(np.int64)


@dataclass(frozen=True)
class Calibration:
    """threshold: grey levels that a share of 1 - `quantile` of the frames exceed.  frames, episodes: looked at."""

    threshold: float
    quantile: float
    frames: int
    episodes: int


def calibrate(files: Iterable[Path], quantile: float = 0.95, layout: TokenLayout | None = None) -> Calibration:
    """The threshold of `FrameGate.surprise` from recorded demonstrations in which nothing moved but what the robot did.

    files: see `mllm.demonstrations.demonstration_files`.  quantile: above 0 and below 1.
    Raises PolicyError: no such quantile, or no episode with three frames or more.
    """
    from mllm.demonstrations import read_demonstration

    if not 0 < quantile < 1:
        raise PolicyError(f"quantile is {quantile}: it must be above 0 and below 1")
    found: list[float] = []
    episodes = 0
    for path in files:
        demonstration = read_demonstration(path, decode=True)
        gate = FrameGate(layout)
        frames = zip(*demonstration.images.values(), strict=True)
        surprises = [gate.surprise(dict(zip(demonstration.images, images, strict=True))) for images in frames]
        found += surprises[2:]
        episodes += 1
    if not found:
        raise PolicyError(f"{episodes} episodes have no third frame: give demonstrations with images")
    return Calibration(float(np.quantile(found, quantile)), quantile, len(found), episodes)
