"""Camera calibration files, as ROS's camera_calibration writes them."""

from __future__ import annotations

import math
from pathlib import Path

import yaml
from sensor_msgs.msg import CameraInfo

from flashvla_ros.errors import ConfigurationError

# Lengths of D that image_geometry and image_proc accept for each model.
DISTORTION_LENGTHS = {"plumb_bob": (4, 5), "rational_polynomial": (8, 12, 14), "equidistant": (4,)}


def read_calibration(path: str) -> CameraInfo:
    """A camera_info without header from a YAML file of ROS camera_calibration.

    Raises ConfigurationError naming the file and the entry that is missing, has the wrong size or is not finite.
    """
    try:
        entries = yaml.safe_load(Path(path.removeprefix("file://")).expanduser().read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"parameter 'calibration': '{path}' cannot be read as YAML: {error}") from error

    def check(condition: bool, entry: str, rule: str) -> None:
        if not condition:
            raise ConfigurationError(f"calibration '{path}': {entry} must be {rule}")

    def matrix(name: str, *shapes: tuple[int, int]) -> list[float]:
        value = entries.get(name)
        rule = f"a map of rows, cols and data, {' or '.join(f'{r} x {c}' for r, c in shapes)}, all finite numbers"
        check(isinstance(value, dict), name, rule)
        data = value.get("data")
        check(
            (value.get("rows"), value.get("cols")) in shapes
            and isinstance(data, list)
            and len(data) == value["rows"] * value["cols"],
            name,
            rule,
        )
        check(all(isinstance(x, (int, float)) and math.isfinite(x) for x in data), name, rule)
        return [float(x) for x in data]

    check(isinstance(entries, dict), "the file", "a map with camera_matrix and the other entries of camera_calibration")
    sizes = entries.get("image_width"), entries.get("image_height")
    for name, size in zip(("image_width", "image_height"), sizes, strict=True):
        check(isinstance(size, int) and size > 0, name, f"a number of pixels above 0, not {size!r}")
    model = entries.get("distortion_model")
    check(model in DISTORTION_LENGTHS, "distortion_model", f"one of {', '.join(DISTORTION_LENGTHS)}, not {model!r}")
    lengths = DISTORTION_LENGTHS[model]
    info = CameraInfo(
        width=sizes[0],
        height=sizes[1],
        distortion_model=model,
        d=matrix("distortion_coefficients", *((1, n) for n in lengths), *((n, 1) for n in lengths)),
        k=matrix("camera_matrix", (3, 3)),
        r=matrix("rectification_matrix", (3, 3)),
        p=matrix("projection_matrix", (3, 4)),
    )
    check(info.k[0] > 0 and info.k[4] > 0, "camera_matrix", "of focal lengths above 0 (a K[0] of 0 means uncalibrated)")
    return info
