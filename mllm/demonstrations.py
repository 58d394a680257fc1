"""Demonstrations: one HDF5 file an episode, in the layout of LIBERO's and robomimic's datasets, with what they lack.

`data` (group)              attributes: problem_info, env_args (JSON), num_demos, total, as LIBERO writes them
`data/demo_0` (group)       attributes: num_samples; flashvla (JSON: everything else that names the episode); crc32
    actions (T, 7)          float64, the labels: what the expert would do, noise or not
    executed (T, 7)         float64, what was done (ours)
    states (T, 1+nq+nv)     float64, simulator, before each action
    robot_states (T, 9)     float64, gripper_qpos, eef_pos, eef_quat xyzw
    rewards, dones (T,)     uint8, 1 in the last step of a success, and in the last step
    targets (T, 6)          float32, m, privileged, for auxiliary losses (ours)
    phases (T,)             int8, what the expert was doing (ours)
    objects/NAME (T, C, 2)  float32, where an object is in C images, privileged, for an auxiliary loss (ours, optional)
    obs/ee_pos, ee_ori, ee_states, gripper_states, joint_states
    obs/agentview_rgb, obs/eye_in_hand_rgb              (T, H, W, 3) uint8, bottom row first, as LIBERO stores them; or
    obs/agentview_rgb_webp, obs/eye_in_hand_rgb_webp    (T,) variable-length uint8, WebP, top row first (ours)
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np

from mllm.errors import PolicyError

# Camera names of the simulator and of LIBERO's files.
CAMERAS = {"agentview": "agentview_rgb", "robot0_eye_in_hand": "eye_in_hand_rgb"}
IMAGE_FORMATS = ("raw", "webp")
WEBP_QUALITY = 90  # 6 to 8 kB for a view of 128 x 128; our choice
WIDTHS = {"eef_pos": 3, "eef_quat": 4, "gripper_qpos": 2, "joint_pos": 7}
LOST = "lost"
OBJECTS = "objects/"

Images = Sequence[bytes] | np.ndarray


@dataclass(frozen=True)
class Demonstration:
    """One episode with the expert's answer to every state in it.

    images: camera name -> upright RGB, (T, H, W, 3) uint8, or T encoded ones (`decode_image`).
    proprio: "eef_pos" (T, 3) m and "eef_quat" (T, 4) xyzw in the world frame, "gripper_qpos" (T, 2) m, "joint_pos"
        (T, 7) rad, float64.
    actions: (T, 7) float64, the expert's, see `mllm.policy.ActionSpec`.  executed: (T, 7) float64, what was done.
    states: (T, 1 + nq + nv) float64, [time s, qpos, qvel] before each action.
    targets: (T, 6) float32 m, world frame: from the hand to where it takes hold of the object, and to where that goes.
    phases: (T,) int8, indices of `phase_names`.
    objects: name, in words such as "alphabet soup" -> (T, cameras, 2) float32: row and column of its middle in the
        images, in the order of `CAMERAS`, as shares of height and width from the top left; NaN outside of an image.
    outcome: "success" or "failure".  source: who drove, such as "expert" or "dagger".
    env_args: what robomimic makes the environment from.  provenance: versions and settings.
    """

    images: Mapping[str, Images]
    proprio: Mapping[str, np.ndarray]
    actions: np.ndarray
    executed: np.ndarray
    states: np.ndarray
    targets: np.ndarray
    phases: np.ndarray
    phase_names: tuple[str, ...]
    instruction: str
    suite: str
    task: int
    seed: int
    outcome: str
    source: str = "expert"
    objects: Mapping[str, np.ndarray] = field(default_factory=dict)
    env_args: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        steps = len(self.actions)
        if not steps:
            raise PolicyError("a demonstration needs at least one step")
        shapes: dict[str, tuple[np.ndarray, tuple[int | None, ...]]] = {
            "actions": (self.actions, (steps, 7)),
            "executed": (self.executed, (steps, 7)),
            "states": (self.states, (steps, None)),
            "targets": (self.targets, (steps, 6)),
            "phases": (self.phases, (steps,)),
        }
        if set(self.proprio) != set(WIDTHS):
            raise PolicyError(f"proprio has {', '.join(sorted(self.proprio))}: it must have {', '.join(WIDTHS)}")
        shapes |= {name: (self.proprio[name], (steps, width)) for name, width in WIDTHS.items()}
        for name, (array, shape) in shapes.items():
            fits = len(array.shape) == len(shape) and all(
                want in (None, have) for have, want in zip(array.shape, shape, strict=True)
            )
            if not fits:
                raise PolicyError(f"{name} has shape {array.shape}: it must be {shape}")
            if not np.isfinite(array).all():
                raise PolicyError(f"{name} holds a number that is not finite")
        for name, frames in self.images.items():
            if name not in CAMERAS or len(frames) != steps:
                raise PolicyError(
                    f"{len(frames)} images of camera {name!r}: there must be {steps}, of one of {', '.join(CAMERAS)}"
                )
        for name, places in self.objects.items():
            if places.shape != (steps, len(self.images), 2):
                raise PolicyError(
                    f"objects: {name!r} has shape {places.shape}: it must be {(steps, len(self.images), 2)}"
                )
        if not (self.phases.min() >= 0 and self.phases.max() < len(self.phase_names)):
            raise PolicyError(f"phases are {self.phases.min()} to {self.phases.max()}: names are {self.phase_names}")
        if self.outcome not in ("success", "failure"):
            raise PolicyError(f"outcome is {self.outcome!r}: it must be success or failure")

    @property
    def success(self) -> bool:
        return self.outcome == "success"

    @property
    def valid(self) -> np.ndarray:
        """(T,) bool: whether the label is worth learning; not where the expert knew of nothing to do ("lost")."""
        lost = [number for number, name in enumerate(self.phase_names) if name == LOST]
        return ~np.isin(self.phases, lost)


def encode_image(image: np.ndarray) -> bytes:
    """WebP of an (H, W, 3) uint8 RGB image."""
    done, buffer = cv2.imencode(".webp", image[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, WEBP_QUALITY])
    if not done:
        raise PolicyError(f"cannot encode an image of {image.dtype} {image.shape} as WebP")
    return buffer.tobytes()


def decode_image(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright. Raises PolicyError: not an image."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if image is None:
        raise PolicyError(f"{len(data)} bytes that are no image")
    return np.ascontiguousarray(image[..., ::-1])


def decode_images(frames: Images) -> np.ndarray:
    """(T, H, W, 3) uint8 RGB, upright, of encoded or decoded images."""
    return frames if isinstance(frames, np.ndarray) else np.stack([decode_image(frame) for frame in frames])


def write_demonstration(path: str | Path, demonstration: Demonstration, images: str = "raw") -> None:
    """Writes `path` whole or not at all: under a temporary name beside it, synced, then renamed.

    images: "raw" as LIBERO has them, which its tools read, or "webp", a tenth of the size.
    Raises PolicyError: another format.  Raises OSError: it cannot be written, such as on a full disk.
    """
    if images not in IMAGE_FORMATS:
        raise PolicyError(f"image format {images!r}: choose one of {', '.join(IMAGE_FORMATS)}")
    # HDF5 does not survive a full disk in good order, so the file is made in memory.
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        _fill(file, demonstration, images)
    write_atomically(Path(path), buffer.getvalue())


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path` by `content`; a kill or a full disk leaves the old file, or none. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{error.strerror or error}: {path} was not written") from error
        raise


def _fill(file: h5py.File, demo: Demonstration, images: str) -> None:
    steps = len(demo.actions)
    last = np.arange(steps) == steps - 1
    gripper, joints, position, quaternion = (
        np.asarray(demo.proprio[name], np.float64) for name in ("gripper_qpos", "joint_pos", "eef_pos", "eef_quat")
    )
    orientation = axis_angle(quaternion)
    arrays = {
        "actions": np.asarray(demo.actions, np.float64),
        "executed": np.asarray(demo.executed, np.float64),
        "states": np.asarray(demo.states, np.float64),
        "robot_states": np.concatenate([gripper, position, quaternion], axis=1),
        "rewards": (last & demo.success).astype(np.uint8),
        "dones": last.astype(np.uint8),
        "targets": np.asarray(demo.targets, np.float32),
        "phases": np.asarray(demo.phases, np.int8),
        "obs/ee_pos": position,
        "obs/ee_ori": orientation,
        "obs/ee_states": np.concatenate([position, orientation], axis=1),
        "obs/gripper_states": gripper,
        "obs/joint_states": joints,
    }
    arrays |= {OBJECTS + name: np.asarray(places, np.float32) for name, places in demo.objects.items()}
    data = file.create_group("data")
    data.attrs.update(layout_attributes(demo.suite, demo.instruction, demo.env_args, demos=1, total=steps))
    group = data.create_group("demo_0")
    for name, array in arrays.items():
        group.create_dataset(name, data=array)
    for camera, frames in demo.images.items():
        if images == "raw":
            group.create_dataset(f"obs/{CAMERAS[camera]}", data=decode_images(frames)[:, ::-1])
        else:
            encoded = [frame if isinstance(frame, bytes) else encode_image(frame) for frame in frames]
            out = group.create_dataset(f"obs/{CAMERAS[camera]}_webp", (steps,), h5py.vlen_dtype(np.uint8))
            for index, frame in enumerate(encoded):
                out[index] = np.frombuffer(frame, np.uint8)
    named = {
        "instruction": demo.instruction,
        "suite": demo.suite,
        "task": demo.task,
        "seed": demo.seed,
        "outcome": demo.outcome,
        "source": demo.source,
        "phase_names": list(demo.phase_names),
        "env_args": dict(demo.env_args),
        "provenance": dict(demo.provenance),
    }
    group.attrs["num_samples"] = steps
    group.attrs["init_state"] = arrays["states"][0]
    group.attrs["flashvla"] = json.dumps(named)
    group.attrs["crc32"] = _checksum(_stored(group), group.attrs["flashvla"])


def layout_attributes(
    suite: str, instruction: str, env_args: Mapping[str, Any], *, demos: int, total: int
) -> dict[str, Any]:
    """The attributes that LIBERO's and robomimic's readers look for on `data`."""
    problem = {
        "problem_name": env_args.get("problem_name", "unknown"),
        "domain_name": "robosuite",
        "language_instruction": instruction,
    }
    return {
        "problem_info": json.dumps(problem),
        "env_args": json.dumps(dict(env_args)),
        "bddl_file_name": env_args.get("bddl_file", ""),
        "tag": suite,
        "num_demos": demos,
        "total": total,
    }


def demonstration_files(root: str | Path) -> list[Path]:
    """Every episode under a folder, in the order of their paths: by suite, task and seed."""
    return sorted(Path(root).rglob("seed_*.hdf5"))


def read_demonstration(path: str | Path, decode: bool = False) -> Demonstration:
    """Reads what `write_demonstration` wrote, and checks that every byte of it is as it was.

    decode: whether images that are stored encoded come decoded, rather than as `bytes` for `decode_image`.
    Raises PolicyError: no such file, truncated, changed, or not a demonstration of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise PolicyError(f"there is no demonstration at {path}")
    try:
        with h5py.File(path, "r") as file:
            group = file["data/demo_0"]
            text, checksum = str(group.attrs["flashvla"]), int(group.attrs["crc32"])
            stored = _stored(group)
        if _checksum(stored, text) != checksum:
            raise PolicyError("its content is not what was written (checksum)")
        return _build(stored, json.loads(text), decode)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, IndexError) as error:
        raise PolicyError(f"{path} is damaged or no demonstration: {error}; delete it and collect it again") from error


def _stored(group: h5py.Group) -> dict[str, Any]:
    """Name -> array, or a list of bytes where elements vary in length."""
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            value = item[()]
            found[name] = [bytes(one) for one in value] if value.dtype == object else value

    group.visititems(visit)
    return found


def _checksum(stored: Mapping[str, Any], text: str) -> int:
    value = zlib.crc32(text.encode())
    for name in sorted(stored):
        value = zlib.crc32(name.encode(), value)
        content = stored[name]
        for part in content if isinstance(content, list) else [content.tobytes()]:
            value = zlib.crc32(part, value)
    return value


def _build(stored: Mapping[str, Any], named: dict[str, Any], decode: bool) -> Demonstration:
    images: dict[str, Images] = {}
    for camera, name in CAMERAS.items():
        if f"obs/{name}_webp" in stored:
            encoded = stored[f"obs/{name}_webp"]
            images[camera] = decode_images(encoded) if decode else encoded
        elif f"obs/{name}" in stored:
            images[camera] = np.ascontiguousarray(stored[f"obs/{name}"][:, ::-1])
    robot = stored["robot_states"]
    return Demonstration(
        images=images,
        proprio={
            "eef_pos": robot[:, 2:5],
            "eef_quat": robot[:, 5:],
            "gripper_qpos": robot[:, :2],
            "joint_pos": stored["obs/joint_states"],
        },
        **{name: stored[name] for name in ("actions", "executed", "states", "targets", "phases")},
        objects={name[len(OBJECTS) :]: places for name, places in stored.items() if name.startswith(OBJECTS)},
        **{**named, "phase_names": tuple(named["phase_names"])},
    )


def axis_angle(quaternions: np.ndarray) -> np.ndarray:
    """(T, 3) rad of (T, 4) xyzw: robosuite's `quat2axisangle`, which keeps the sign of w in the angle (0 to 2 pi)."""
    w = np.clip(quaternions[:, 3:], -1.0, 1.0)
    sine = np.sqrt(1.0 - w * w)
    turned = np.where(np.isclose(sine, 0.0), 0.0, 2.0 * np.arccos(w) / np.where(sine > 0, sine, 1.0))
    return quaternions[:, :3] * turned
