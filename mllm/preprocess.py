"""From a camera's image to the pixels of a vision tower, as OpenVLA's evaluation does it.

OpenVLA resizes and crops by TensorFlow. Ours resizes by Pillow, whose Lanczos filter has the same windows but rounds
between its two passes: on images of a scene at most 1/255 apart. The crop is TensorFlow's arithmetic in NumPy.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping

import cv2
import numpy as np
from PIL import Image

from mllm.config import VLAConfig
from mllm.errors import PolicyError

JPEG_QUALITY = 95
CROP_AREA = 0.9


class Preprocess:
    """What `VLAConfig.images` and the towers ask for, with its tables made once."""

    def __init__(self, config: VLAConfig) -> None:
        self.cameras, self.size, self.images = config.cameras, config.image_size, config.images
        levels = np.arange(256, dtype=np.float32) / np.float32(255)
        # One table a channel is exact: the arithmetic is that of an image, done once for each of its 256 values.
        self._levels = [
            (levels - np.float32(mean)) / np.float32(std)
            for tower in config.towers
            for mean, std in zip(tower.mean, tower.std, strict=True)
        ]

    def __call__(self, images: Mapping[str, np.ndarray]) -> np.ndarray:
        """images: camera -> (H, W, 3) uint8 RGB, upright. Returns (cameras, 3 * towers, S, S) float32.

        Raises PolicyError: a camera is missing, or its image has another shape or type.
        """
        pixels = np.empty((len(self.cameras), len(self._levels), self.size, self.size), np.float32)
        for planes, camera in zip(pixels, self.cameras, strict=True):
            if camera not in images:
                raise PolicyError(
                    f"the observation lacks camera '{camera}'; it has {', '.join(sorted(images)) or 'none'}"
                )
            view = self.view(images[camera], camera)
            for channel, table in enumerate(self._levels):
                np.take(table, view[..., channel % 3], out=planes[channel])
        return pixels

    def view(self, image: np.ndarray, camera: str = "image") -> np.ndarray:
        """image: (H, W, 3) uint8 RGB, upright. Returns (S, S, 3) uint8: what the model sees, before normalisation."""
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            found = f"{image.shape} {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
            raise PolicyError(f"camera '{camera}' gave {found}: it must be (H, W, 3) uint8")
        if 0 in image.shape:
            raise PolicyError(f"camera '{camera}' gave {image.shape}: it has no pixels")
        options = self.images
        if options.mirror:
            image = image[:, ::-1]
        if options.jpeg:
            image = jpeg_round_trip(image)
        image = resize(image, self.size, options.resize)
        return centre_crop(image) if options.centre_crop else image


def jpeg_round_trip(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 through JPEG at quality 95 with halved colour planes, as OpenVLA's data went."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    return np.asarray(Image.open(buffer))


def resize(image: np.ndarray, size: int, method: str) -> np.ndarray:
    """(H, W, 3) uint8 to (size, size, 3), whatever its sides ("resize-naive"); one of that size passes unchanged."""
    if image.shape[:2] == (size, size):
        return image
    if method == "area":
        return cv2.resize(np.ascontiguousarray(image), (size, size), interpolation=cv2.INTER_AREA)
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((size, size), Image.Resampling.LANCZOS))


def centre_crop(image: np.ndarray, area: float = CROP_AREA) -> np.ndarray:
    """(S, S, 3) uint8: the middle `area` of it, enlarged to S x S.

    TensorFlow's `crop_and_resize`: bilinear, corners on corners, float32; and its conversion to uint8, which scales by
    255.5 and cuts.
    """
    size = image.shape[0]
    side = math.sqrt(area)
    low = np.float32((1 - side) / 2) * np.float32(size - 1)
    places = low + np.arange(size, dtype=np.float32) * (np.float32(side) * np.float32(size - 1) / np.float32(size - 1))
    first = np.floor(places).astype(np.int64)
    second = np.minimum(first + 1, size - 1)
    share = (places - first).astype(np.float32)
    scaled = image.astype(np.float32) * np.float32(1 / 255)
    left = scaled[:, first]
    rows = left + (scaled[:, second] - left) * share[None, :, None]
    above = rows[first]
    blended = above + (rows[second] - above) * share[:, None, None]
    return (np.clip(blended, 0, 1) * np.float32(255.5)).astype(np.uint8)
