"""Where the package's own files are: launch files, parameters, profiles, recorded episodes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flashvla_ros.errors import ConfigurationError

PACKAGE = "flashvla_ros"


def share_directory() -> Path:
    """The folder with `launch/`: a source checkout, an ament prefix (colcon) or the Python prefix (pip).

    Raises ConfigurationError when the package's data files were not installed.
    """
    checkout = Path(__file__).resolve().parent.parent
    prefixes = [*os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep), sys.prefix]
    candidates = [checkout, *(Path(prefix) / "share" / PACKAGE for prefix in prefixes if prefix)]
    for candidate in candidates:
        if (candidate / "launch" / "fastdds.xml").is_file():
            return candidate
    raise ConfigurationError(
        f"the files of {PACKAGE} are in none of {', '.join(map(str, candidates))}: install the "
        "package with pip or colcon"
    )


def config_file(name: str) -> Path:
    """A parameter file of `launch/config`."""
    return share_directory() / "launch" / "config" / name


def fastdds_profile() -> Path:
    """The transport profile with room for images in shared memory."""
    return share_directory() / "launch" / "fastdds.xml"


def demo_episode() -> Path:
    """The recorded expert episode that the demo replays."""
    return share_directory() / "launch" / "episodes" / "libero_spatial_0.safetensors"
