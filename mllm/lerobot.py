"""Demonstrations as a LeRobotDataset v3, which the `lerobot` package opens: parquet, mp4 and JSON, without `lerobot`.

Names and conventions are those of lerobot's LIBERO environment, so that its policies train on the export and run in it:
`observation.images.image` and `image2` are the two cameras turned by 180 degrees from LIBERO's raw images, which is the
upright view mirrored left to right; `observation.state` is position (m), axis-angle (rad) and finger positions (m); and
`action` is the expert's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from mllm.demonstrations import Demonstration, axis_angle, decode_images, demonstration_files, read_demonstration
from mllm.errors import PolicyError

FPS = 20
CAMERAS = {"agentview": "observation.images.image", "robot0_eye_in_hand": "observation.images.image2"}
VECTORS = {
    "observation.state": ("x", "y", "z", "rx", "ry", "rz", "finger0", "finger1"),
    "action": ("dx", "dy", "dz", "rx", "ry", "rz", "gripper"),
}
COUNTERS = {"timestamp": "float32"} | dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
PLACE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
CHUNK = 1000  # files in a folder, lerobot's own
FILE_FRAMES = 100_000  # after which an episode starts a new file; about 200 MB of a 128 px video; our choice
# Every second frame is a key frame, as lerobot has it: a random frame costs two.
CODEC, OPTIONS = "libx264", {"crf": "18", "g": "2", "preset": "medium"}
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
SAMPLED_FRAMES, SAMPLED_PIXELS = 10, 7  # of an episode, and every n-th in both directions, for the images' statistics


@dataclass(frozen=True)
class Exported:
    """What was written. skipped: episodes in which the expert had no answer to the first frame."""

    episodes: int
    frames: int
    skipped: int


def export_lerobot(
    source: Path, out: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> Exported:
    """Writes every demonstration under `source` to the new folder `out`.

    An episode ends before the first frame for which the expert had no answer (`Demonstration.valid`).
    progress: called with episodes done, and all.
    Raises PolicyError: nothing there, a damaged file, episodes that do not fit together, or `out` exists. Raises
    OSError: it cannot be written. Then nothing is left of `out`.
    """
    files = demonstration_files(source)
    if not files:
        raise PolicyError(f"there is no demonstration under {source}: `flashvla collect` makes them")
    if out.exists():
        raise PolicyError(f"{out} exists: give a new folder")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with _Writer(temporary) as writer:
            for number, path in enumerate(files):
                progress(number, len(files))
                writer.add(path)
        progress(len(files), len(files))
        done = writer.finish()
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return done


@dataclass
class _File:
    """The parquet and the videos that episodes are appended to."""

    index: int
    data: Any
    videos: dict[str, tuple[Any, Any]]  # container, stream
    frames: int = 0

    def close(self) -> None:
        self.data.close()
        for container, stream in self.videos.values():
            for packet in stream.encode():
                container.mux(packet)
            container.close()


@dataclass
class _Writer:
    root: Path
    size: tuple[int, int] = (0, 0)
    frames: int = 0
    skipped: int = 0
    tasks: dict[str, int] = field(default_factory=dict)
    episodes: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, list[np.ndarray]] = field(default_factory=dict)
    file: _File | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def add(self, path: Path) -> None:
        demo = read_demonstration(path)
        steps = len(demo.valid) if demo.valid.all() else int(np.argmin(demo.valid))
        if steps == 0:
            self.skipped += 1
            return
        images = {key: _views(demo, camera, steps, path) for camera, key in CAMERAS.items()}
        for key, frames in images.items():
            if not self.size[0]:
                self._check_size(frames.shape[1:3], path)
            if frames.shape[1:3] != self.size:
                raise PolicyError(f"{path}: {key} is {frames.shape[1:3]}, and others are {self.size} pixels")
        if self.file is None or self.file.frames >= FILE_FRAMES:
            self._next_file()
        assert self.file is not None
        episode, task = len(self.episodes), self.tasks.setdefault(demo.instruction, len(self.tasks))
        columns = {
            "observation.state": _state(demo)[:steps],
            "action": demo.actions[:steps].astype(np.float32),
            "timestamp": (np.arange(steps) / FPS).astype(np.float32),
            "frame_index": np.arange(steps),
            "episode_index": np.full(steps, episode),
            "index": self.frames + np.arange(steps),
            "task_index": np.full(steps, task),
        }
        self.file.data.write_table(_table(columns))
        for key, frames in images.items():
            _encode(*self.file.videos[key], frames)
        self._describe(demo, columns, images)
        self.file.frames += steps
        self.frames += steps

    def _check_size(self, size: tuple[int, ...], path: Path) -> None:
        if size[0] % 2 or size[1] % 2:
            raise PolicyError(f"{path}: images are {size} pixels, and video needs even numbers")
        self.size = (size[0], size[1])

    def _next_file(self) -> None:
        import av
        from pyarrow import parquet

        index = 0
        if self.file is not None:
            index = self.file.index + 1
            self.file.close()
        place = PLACE.format(chunk_index=index // CHUNK, file_index=index % CHUNK)
        videos = {}
        for key in CAMERAS.values():
            path = self.root / "videos" / key / f"{place}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            container = av.open(str(path), "w")
            stream: Any = container.add_stream(CODEC, rate=FPS, options=OPTIONS)
            stream.height, stream.width = self.size
            stream.pix_fmt = "yuv420p"
            stream.time_base = Fraction(1, FPS)
            videos[key] = (container, stream)
        path = self.root / "data" / f"{place}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = _File(index, parquet.ParquetWriter(path, _table(None).schema), videos)

    def _describe(self, demo: Demonstration, columns: dict[str, np.ndarray], images: dict[str, np.ndarray]) -> None:
        assert self.file is not None
        steps, file = len(columns["index"]), self.file
        where = {"chunk_index": file.index // CHUNK, "file_index": file.index % CHUNK}
        row: dict[str, Any] = {
            "episode_index": len(self.episodes),
            "tasks": [demo.instruction],
            "length": steps,
            "dataset_from_index": self.frames,
            "dataset_to_index": self.frames + steps,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
            **{f"data/{name}": value for name, value in where.items()},
        }
        for key in images:
            row |= {f"videos/{key}/{name}": value for name, value in where.items()}
            row[f"videos/{key}/from_timestamp"] = file.frames / FPS
            row[f"videos/{key}/to_timestamp"] = (file.frames + steps) / FPS
        chosen = np.unique(np.linspace(0, steps - 1, SAMPLED_FRAMES).astype(int))
        samples = dict(columns)
        for key, frames in images.items():
            samples[key] = frames[chosen, ::SAMPLED_PIXELS, ::SAMPLED_PIXELS].reshape(-1, 3)
        for key, sample in samples.items():
            self.samples.setdefault(key, []).append(sample)
            row |= {f"stats/{key}/{name}": value for name, value in _statistics(sample, steps).items()}
        self.episodes.append(row)

    def finish(self) -> Exported:
        import pyarrow as pa
        from pyarrow import parquet

        if not self.episodes:
            raise PolicyError(
                f"none of the {self.skipped} demonstrations has a frame for which the expert had an answer"
            )
        meta = self.root / "meta"
        (meta / "episodes/chunk-000").mkdir(parents=True)
        parquet.write_table(pa.Table.from_pylist(self.episodes), meta / "episodes" / "chunk-000/file-000.parquet")
        parquet.write_table(_tasks(self.tasks), meta / "tasks.parquet")
        stats = {key: _statistics(np.concatenate(rows), self.frames) for key, rows in self.samples.items()}
        (meta / "stats.json").write_text(json.dumps(stats, indent=4))
        (meta / "info.json").write_text(json.dumps(self._info(), indent=4))
        return Exported(len(self.episodes), self.frames, self.skipped)

    def _info(self) -> dict[str, Any]:
        height, width = self.size
        video = {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": height,
                "video.width": width,
                "video.codec": "h264",
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": FPS,
                "video.channels": 3,
                "has_audio": False,
            },
        }
        vectors = {
            key: {"dtype": "float32", "shape": [len(names)], "names": list(names)} for key, names in VECTORS.items()
        }
        counters = {key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in COUNTERS.items()}
        return {
            "codebase_version": "v3.0",
            "robot_type": "panda",
            "total_episodes": len(self.episodes),
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": CHUNK,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": FPS,
            "splits": {"train": f"0:{len(self.episodes)}"},
            "data_path": f"data/{PLACE}.parquet",
            "video_path": f"videos/{{video_key}}/{PLACE}.mp4",
            "features": {**dict.fromkeys(CAMERAS.values(), video), **vectors, **counters},
        }


def _views(demo: Demonstration, camera: str, steps: int, path: Path) -> np.ndarray:
    if camera not in demo.images:
        raise PolicyError(f"{path} has no images of {camera}")
    return decode_images(demo.images[camera][:steps])[:, :, ::-1]


def _state(demo: Demonstration) -> np.ndarray:
    parts = (demo.proprio["eef_pos"], axis_angle(demo.proprio["eef_quat"]), demo.proprio["gripper_qpos"])
    return np.concatenate(parts, axis=1).astype(np.float32)


def _encode(container: Any, stream: Any, frames: np.ndarray) -> None:
    import av

    for image in frames:
        for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")):
            container.mux(packet)


def _table(columns: dict[str, np.ndarray] | None) -> Any:
    """The frames of one episode as a pyarrow table; without columns, an empty one."""
    import pyarrow as pa

    types = {key: pa.list_(pa.float32(), len(names)) for key, names in VECTORS.items()}
    types |= {key: pa.type_for_alias(dtype) for key, dtype in COUNTERS.items()}
    if columns is None:
        return pa.schema(types).empty_table()
    arrays = [
        pa.FixedSizeListArray.from_arrays(pa.array(columns[key].ravel()), len(VECTORS[key]))
        if key in VECTORS
        else pa.array(columns[key], kind)
        for key, kind in types.items()
    ]
    return pa.Table.from_arrays(arrays, schema=pa.schema(types))


def _tasks(tasks: dict[str, int]) -> Any:
    """What pandas writes for a frame with the instructions as its index, which is how lerobot reads it."""
    import pyarrow as pa

    column = {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"}
    index = {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object"}
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": [column, index], "pandas_version": "2.0"}
    table = pa.table({"task_index": pa.array(list(tasks.values()), pa.int64()), "task": list(tasks)})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _statistics(sample: np.ndarray, count: int) -> dict[str, Any]:
    """lerobot's statistics of a feature; of pixels, (n, 3) uint8, as (3, 1, 1) lists of numbers from 0 to 1."""
    pixels = sample.dtype == np.uint8
    values = sample / 255.0 if pixels else sample.astype(np.float64).reshape(len(sample), -1)
    found = {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
        **dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values()), axis=0), strict=True)),
    }
    shaped = {name: value.reshape(3, 1, 1) if pixels else value for name, value in found.items()}
    return {**{name: value.tolist() for name, value in shaped.items()}, "count": [count]}
