"""What a client of the policy server asks for: an observation in one of two layouts, a reset, or both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mllm.policy import Observation

LIBERO_IMAGES = {"observation/image": "agentview", "observation/wrist_image": "robot0_eye_in_hand"}
LIBERO_STATE = "observation/state"


class RequestError(ValueError):
    """A message was read but asks for nothing that can be done; the text says what to send instead."""


@dataclass(frozen=True)
class Request:
    """observation: None where only a reset is asked for.  prompt: None where the message has none.

    reset: a new episode begins before the observation.
    """

    observation: Observation | None
    prompt: str | None = None
    reset: bool = False


def read_request(message: Mapping[Any, Any]) -> Request:
    """The request of an unpacked message; keys that it does not know are ignored.

    Our layout: "images" {camera: (H, W, 3) uint8 RGB, upright}, and optionally "proprio" {name: vector} and "stamp"
    (s), all as in `Observation`.
    LIBERO's, as openpi's evaluation sends it: "observation/image" and "observation/wrist_image" (H, W, 3) uint8 RGB,
    the simulator's raw image turned by 180 degrees, and "observation/state" (8,): position (m), axis-angle (rad) and
    two fingers (m). They become the upright "agentview" and "robot0_eye_in_hand", "eef_pos", "eef_quat" and
    "gripper_qpos".
    Both: "prompt", the task in words, and "reset": True. A reset may come without an observation.
    Raises RequestError: a value that is not as above, or neither layout nor a reset.
    """
    prompt, reset = message.get("prompt"), message.get("reset", False)
    if prompt is not None and not isinstance(prompt, str):
        raise RequestError(f"'prompt' is a {type(prompt).__name__}: it must be a string")
    if not isinstance(reset, bool | np.bool_):
        raise RequestError(f"'reset' is a {type(reset).__name__}: it must be true or false")
    return Request(_read_observation(message, bool(reset)), prompt, bool(reset))


def _read_observation(message: Mapping[Any, Any], reset: bool) -> Observation | None:
    if "images" in message:
        return _read_own(message)
    if any(key in message for key in (*LIBERO_IMAGES, LIBERO_STATE)):
        return _read_libero(message)
    if reset:
        return None
    keys = ", ".join(sorted(repr(key)[:40] for key in list(message)[:10])) or "none"
    raise RequestError(f"no observation in the message (keys: {keys}): send 'images', or 'observation/image' as LIBERO")


def _read_own(message: Mapping[Any, Any]) -> Observation:
    images, proprio, stamp = message["images"], message.get("proprio", {}), message.get("stamp", 0.0)
    for key, value in (("images", images), ("proprio", proprio)):
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise RequestError(f"'{key}' is not a map with names as keys")
    if not images:
        raise RequestError("'images' is empty: send at least one camera")
    if isinstance(stamp, bool) or not isinstance(stamp, int | float | np.number) or not math.isfinite(stamp):
        raise RequestError("'stamp' is not a finite number of seconds")
    return Observation(
        images={name: _read_image(f"images.{name}", image) for name, image in images.items()},
        proprio={name: _read_vector(f"proprio.{name}", vector) for name, vector in proprio.items()},
        stamp=float(stamp),
    )


def _read_libero(message: Mapping[Any, Any]) -> Observation:
    if "observation/image" not in message:
        raise RequestError("'observation/image' is missing")
    images = {
        # The raw image is bottom-up: turned by 180 degrees, it is the upright one mirrored left to right.
        camera: np.ascontiguousarray(_read_image(key, message[key])[:, ::-1])
        for key, camera in LIBERO_IMAGES.items()
        if key in message
    }
    if LIBERO_STATE not in message:
        return Observation(images)
    state = _read_vector(LIBERO_STATE, message[LIBERO_STATE])
    if state.shape != (8,):
        raise RequestError(f"'{LIBERO_STATE}' has {state.size} numbers: it must have 8")
    proprio = {"eef_pos": state[:3], "eef_quat": quaternion(state[3:6]), "gripper_qpos": state[6:]}
    return Observation(images, proprio)


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """The rotation with this axis-angle vector, (3,) rad, as a unit quaternion (4,) xyzw."""
    half = np.linalg.norm(rotation) / 2
    return np.append(rotation * np.sinc(half / np.pi) / 2, np.cos(half))


def _read_image(key: str, image: Any) -> np.ndarray:
    if not isinstance(image, np.ndarray):
        raise RequestError(f"'{key}' is a {type(image).__name__}: it must be an array")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise RequestError(f"'{key}' has shape {image.shape} and dtype {image.dtype}: it must be (H, W, 3) uint8 RGB")
    return image


def _read_vector(key: str, vector: Any) -> np.ndarray:
    """The vector as native float64."""
    if isinstance(vector, list) and all(type(number) in (int, float) for number in vector):
        vector = np.array(vector, np.float64)
    if not isinstance(vector, np.ndarray) or vector.dtype.kind not in "iuf" or vector.ndim != 1:
        raise RequestError(f"'{key}' is not a vector of numbers")
    vector = vector.astype(np.float64)
    if not np.isfinite(vector).all():
        raise RequestError(f"'{key}' has numbers that are not finite")
    return vector
