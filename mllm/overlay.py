"""What a policy looked at, drawn on its camera's image: kept tokens bright, dropped ones dark, merges as lines.

Our choice throughout; see `mllm.policy.ActionStep.kept` and `.merged`. Colours are RGB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from mllm.errors import PolicyError
from mllm.policy import ActionStep, TokenLayout

SIDE = 384  # pixels; a smaller image is enlarged to at least this, so that lines and words can be read
BADGE = 26  # pixels, height of the strip below the image
DIMMED = 0.3  # times a pixel's brightness
LINK = (255, 190, 60)
COMPUTED, REUSED, CONTINUED = (47, 111, 171), (192, 90, 43), (93, 103, 115)


@dataclass(frozen=True)
class Badge:
    """What the strip below an image says about the step, on which colour."""

    text: str
    colour: tuple[int, int, int]

    @classmethod
    def of(cls, step: ActionStep, looked: bool) -> Badge:
        """looked: whether the model ran."""
        if step.flags.get("reuse"):
            word, why, colour = "reused", figures(step.flags), REUSED
        elif not looked:
            word, why, colour = "computed earlier", "", CONTINUED
        else:
            reason = str(step.flags.get("reuse_reason", ""))
            word, why, colour = "computed", reason.removeprefix("computed-").replace("-", " "), COMPUTED
        return cls(f"{word}: {why}" if why else word, colour)


def figures(flags: Mapping[str, Any]) -> str:
    """The reuse's angle, overlap and surprise in few characters; see `mllm.reuse.Decision`."""
    forms = {"reuse_angle": "{:.0f} deg", "reuse_overlap": "{:.0%} same", "reuse_surprise": "{:.0f} grey"}
    return ", ".join(form.format(flags[name]) for name, form in forms.items() if name in flags)


class Overlay:
    """The tokens of the last look, which hold until the next: a reuse and the rest of a plan look at nothing.

    layout: of the policy; None is a policy that says nothing about its tokens: then every image is bright.
    """

    def __init__(self, layout: TokenLayout | None) -> None:
        self.layout = layout
        self.clear()

    def clear(self) -> None:
        """Forgets the last look: a new episode begins."""
        self.kept: np.ndarray | None = None
        self.merged: np.ndarray | None = None
        self._left = 0
        self._badge: Badge | None = None

    def add(self, step: ActionStep) -> Badge:
        """The next step of the policy. Returns its badge; a reuse that goes on has the one with which it began.

        Raises PolicyError: its tokens are not the layout's.
        """
        goes_on = bool(step.flags.get("reuse")) or self._left > 0
        looked = step.kept is not None or step.plan is not None or not goes_on
        self._left = step.left
        if looked:
            self.kept = self.merged = None  # also where the new ones are refused: the old ones are no longer true
            tokens = 0 if self.layout is None else self.layout.tokens
            for name, numbers in (("kept", step.kept), ("merged", step.merged)):
                if numbers is not None and numbers.size and not 0 <= numbers.min() <= numbers.max() < tokens:
                    raise PolicyError(
                        f"ActionStep.{name} has tokens {numbers.min()} to {numbers.max()}: the policy's layout "
                        f"has {tokens}; give it the layout of its tokens"
                    )
            self.kept, self.merged = step.kept, step.merged
        before = self._badge
        continues = step.flags.get("reuse") and "reuse_reason" not in step.flags
        if before is not None and before.colour == REUSED and continues:
            return before
        self._badge = Badge.of(step, looked)
        return self._badge

    def draw(self, image: np.ndarray, camera: str, badge: Badge) -> np.ndarray:
        """image: (H, W, 3) uint8 RGB, the camera's, upright. Returns the picture, (H', W', 3) uint8 RGB."""
        times = -(-SIDE // min(image.shape[:2]))
        picture = cv2.resize(image, None, fx=times, fy=times, interpolation=cv2.INTER_CUBIC)
        count = ""
        if self.layout is not None:
            shape = (picture.shape[0], picture.shape[1])
            bright = kept_pixels(self.layout, camera, self.kept, shape)
            picture = dim(picture, bright)
            if self.merged is not None:
                draw_links(picture, links(self.layout, camera, self.merged, shape))
            if self.kept is not None:
                own, there = tokens_of(self.layout, camera, self.kept), self.layout.rows * self.layout.columns
                count = f"{len(own)}/{there}" if camera in self.layout.cameras else "not seen"
        return np.vstack((picture, strip(badge, count, picture.shape[1])))


def tokens_of(layout: TokenLayout, camera: str, tokens: np.ndarray) -> np.ndarray:
    """Those of `tokens` that are the camera's, counted from its first; none of a camera that the model has not."""
    if camera not in layout.cameras:
        return tokens[:0]
    size = layout.rows * layout.columns
    own = tokens - layout.cameras.index(camera) * size
    return own[(own >= 0) & (own < size)]


def edges(layout: TokenLayout, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Where tokens begin and end in an image of (H, W) pixels: rows + 1 and columns + 1 edges, rising float64."""
    inset = (1 - layout.area**0.5) / 2
    rows, columns = (
        side * np.linspace(inset, 1 - inset, count + 1)
        for side, count in zip(shape, (layout.rows, layout.columns), strict=True)
    )
    return rows, columns


def kept_pixels(layout: TokenLayout, camera: str, kept: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: the pixels of the tokens that the model kept of this camera. kept: None is all that it sees.

    A pixel is the token's that its centre lies in.
    """
    seen = np.arange(layout.tokens) if kept is None else kept
    grid = np.zeros((layout.rows + 2, layout.columns + 2), bool)  # around them what the model does not see
    own = tokens_of(layout, camera, seen)
    grid[own // layout.columns + 1, own % layout.columns + 1] = True
    if layout.mirror:
        grid = grid[:, ::-1]
    row, column = (
        np.searchsorted(edge, np.arange(side) + 0.5, side="right")
        for edge, side in zip(edges(layout, shape), shape, strict=True)
    )
    return grid[row][:, column]


def links(layout: TokenLayout, camera: str, merged: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(L, 2, 2) int64, pixels (x, y): the middle of each merged token, and of the one that it is part of now.

    merged: (M, 2). A token merged into one of another camera has no line here.
    """
    size = layout.rows * layout.columns
    if camera not in layout.cameras:
        return np.empty((0, 2, 2), np.int64)
    pairs = merged[np.all(merged // size == layout.cameras.index(camera), axis=1)] % size
    rows, columns = (edge[:-1] + np.diff(edge) / 2 for edge in edges(layout, shape))
    row, column = pairs // layout.columns, pairs % layout.columns
    if layout.mirror:
        column = layout.columns - 1 - column
    return np.stack((columns[column], rows[row]), axis=-1).astype(np.int64)


def dim(image: np.ndarray, bright: np.ndarray) -> np.ndarray:
    """The (H, W, 3) uint8 image with what is not bright at `DIMMED` of its brightness."""
    dark = cv2.convertScaleAbs(image, alpha=DIMMED)
    return cv2.copyTo(image, bright.astype(np.uint8), dark)


def draw_links(image: np.ndarray, lines: np.ndarray) -> None:
    """Draws thin lines into the image, with a dot where a token went to."""
    for start, end in lines:
        cv2.line(image, start.tolist(), end.tolist(), LINK, 1, cv2.LINE_AA)
        cv2.circle(image, end.tolist(), 2, LINK, -1, cv2.LINE_AA)


def strip(badge: Badge, count: str, width: int) -> np.ndarray:
    """(BADGE, width, 3) uint8: the badge's words on the left, `count` on the right, as large as both fit."""
    picture = np.full((BADGE, width, 3), badge.colour, np.uint8)
    font, size, margin = cv2.FONT_HERSHEY_SIMPLEX, 0.48, 8

    def length(text: str) -> int:
        return cv2.getTextSize(text, font, size, 1)[0][0]

    size *= min(1.0, (width - 3 * margin) / max(1, length(badge.text) + length(count)))
    for text, x in ((badge.text, margin), (count, width - margin - length(count))):
        cv2.putText(picture, text, (x, BADGE - 9), font, size, (255, 255, 255), 1, cv2.LINE_AA)
    return picture
