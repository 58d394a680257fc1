"""Safetensors files, read tensor by tensor into memory that is already there, and written without a second copy.

The safetensors library maps a file, and every page that was touched counts as the process's memory until the mapping
ends: twice the weights while they load. Here bytes go from the file to where they belong. Nothing in a file is trusted:
its header is bounded and checked whole before a tensor is read.

Format: 8 bytes little-endian header length; a JSON header {name: {"dtype", "shape", "data_offsets": [begin, end]}},
"__metadata__" aside; then the tensors' bytes, without holes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mllm.errors import PolicyError

MAX_HEADER = 16 << 20
MAX_DIMENSIONS = 8
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {**FLOATS, "U8": torch.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes read at a time where the type must change on the way.
CHUNK = 8 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: its type, shape, and bytes `begin` to `end` counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """What a file holds. Raises PolicyError: not a safetensors file, truncated, or a header that does not add up."""
    header, start, size = _header(path)
    header.pop("__metadata__", None)
    entries = {name: _entry(f"{path}: tensor '{name[:120]}'", value, start) for name, value in header.items()}
    expected = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin != expected:
            raise PolicyError(
                f"{path}: tensor '{name}' begins at byte {entry.begin}, not at {expected}: a hole or an overlap"
            )
        expected = entry.end
    if expected != size:
        raise PolicyError(f"{path} has {size} bytes and its tensors end at {expected}: it is truncated or not whole")
    return entries


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a file says of itself. Raises PolicyError: see `read_header`, or what is no text."""
    found = _header(path)[0].get("__metadata__", {})
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise PolicyError(f"{path} has metadata {str(found)[:80]}: it must be a JSON object of texts")
    return found


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON object at a file's head, where the tensors' bytes begin, and the file's size."""
    if not path.is_file():
        raise PolicyError(f"there is no {path}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise PolicyError(f"{path} is truncated, or no safetensors file: {size} bytes, and a header of {length}")
        if length > MAX_HEADER:
            raise PolicyError(f"{path} has a header of {length} bytes: at most {MAX_HEADER} are read")
        try:
            header = json.loads(file.read(length).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise PolicyError(f"{path} is no safetensors file: its header is not JSON ({str(error)[:100]})") from error
    if not isinstance(header, dict):
        raise PolicyError(f"{path} is no safetensors file: its header is not a JSON object")
    return header, 8 + length, size


def _entry(where: str, value: Any, start: int) -> Entry:
    if not isinstance(value, Mapping) or not {"dtype", "shape", "data_offsets"} <= set(value):
        raise PolicyError(f"{where} has no dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise PolicyError(f"{where} has dtype {str(dtype)[:40]!r}: it must be one of {', '.join(DTYPES)}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        whole = isinstance(numbers, list) and all(type(number) is int and 0 <= number < 2**48 for number in numbers)
        if not whole or len(numbers) > MAX_DIMENSIONS:
            raise PolicyError(f"{where} has {what} {str(numbers)[:80]}: it must be a short list of whole numbers")
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != wanted:
        raise PolicyError(f"{where} has offsets {offsets}: its shape {shape} takes {wanted} bytes")
    return Entry(DTYPES[dtype], tuple(shape), start + offsets[0], start + offsets[1])


def read_into(file: BinaryIO, entry: Entry, target: Tensor) -> None:
    """Fills `target`, contiguous and of the entry's shape, whatever its type and device.

    Raises PolicyError: the file ended early.
    """
    file.seek(entry.begin)
    flat = target.view(-1)
    if target.device.type == "cpu" and target.dtype == entry.dtype:
        _read(file, flat)
        return
    step = CHUNK // entry.dtype.itemsize
    buffer = torch.empty(min(step, flat.numel()), dtype=entry.dtype)
    for begin in range(0, flat.numel(), step):
        piece = buffer[: min(step, flat.numel() - begin)]
        _read(file, piece)
        flat[begin : begin + piece.numel()].copy_(piece)


def _read(file: BinaryIO, flat: Tensor) -> None:
    view = flat.view(torch.uint8).numpy().data
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise PolicyError(f"{file.name} ended early: it changed while it was read")
        done += count


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a file that the safetensors library reads too, with texts about itself if given.

    Raises PolicyError: a type that it cannot hold.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise PolicyError(f"tensor '{name}' is {tensor.dtype}: it must be one of {', '.join(DTYPES)}")
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            flat = tensor.detach().contiguous().cpu().view(-1)
            file.write(flat.view(torch.uint8).numpy().data)
