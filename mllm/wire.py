"""msgpack with NumPy arrays, byte for byte as `openpi_client.msgpack_numpy` writes it, and read without trust.

An array is the map {b"__ndarray__": True, b"data": its bytes in C order, b"dtype": e.g. "<f4", b"shape": sides}, a
NumPy scalar {b"__npgeneric__": True, b"data": number, b"dtype": ...}; all else is plain msgpack. What is read is
bounded whatever the sender claims: no pickle, no object or structured dtype, no extension type, an array needs exactly
the bytes of its shape, and the limits below hold for all the rest. The caller bounds the bytes of the whole message.
Needs msgpack 1.2.1: the ones before never free what they had built of a message when the rest of it is malformed.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgpack
import numpy as np

MAX_ITEMS = 16_384  # entries of all maps and lists of a message together
MAX_LENGTH = 1_024  # entries of one map or list
MAX_TEXT = 65_536  # bytes of one string
MAX_DIMENSIONS = 8
MAX_EMPTY_SIDE = 65_536  # an array without elements costs its sender nothing, however long its other sides

_NUMBER = r"[<>|](?:b1|[iu][1248]|f[248])"
_SCALAR_DTYPE = re.compile(_NUMBER, re.ASCII)
_ARRAY_DTYPE = re.compile(rf"{_NUMBER}|[<>|][US][1-9]\d{{0,4}}", re.ASCII)
_ARRAY_KEYS = {b"__ndarray__", b"data", b"dtype", b"shape"}
_SCALAR_KEYS = {b"__npgeneric__", b"data", b"dtype"}
_LAST_CODE_POINT = 0x10FFFF


class WireError(ValueError):
    """A message cannot be written or read; the text says what is wrong with it."""


def pack(value: Any) -> bytes:
    """The value as a message.

    value: None, booleans, numbers, str, bytes, lists, tuples, maps, and NumPy arrays and scalars of booleans, integers,
    float16 to float64 or text, nested as needed.
    Raises WireError: anything else.
    """
    try:
        return msgpack.packb(value, default=_encode)
    except WireError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"the value cannot be packed: {error}") from error


def unpack(message: bytes) -> Any:
    """The value of a message. Tuples come back as lists; arrays are read-only views of their bytes.

    Raises WireError: not one complete msgpack value, beyond a limit, or an array or scalar that is not as above.
    """
    reader = _Reader()
    try:
        return msgpack.unpackb(
            message,
            object_hook=reader.read_map,
            list_hook=reader.read_list,
            max_str_len=MAX_TEXT,
            max_array_len=MAX_LENGTH,
            max_map_len=MAX_LENGTH,
            max_ext_len=0,
            ext_hook=_refuse_extension,
        )
    except WireError:
        raise
    except (TypeError, ValueError) as error:  # all that msgpack raises for bytes that it cannot read
        raise WireError(f"the message is not msgpack within the limits: {error or type(error).__name__}") from error


class _Reader:
    """Counts the entries of one message while msgpack builds it, innermost first."""

    def __init__(self) -> None:
        self._items = 0

    def read_list(self, items: list[Any]) -> list[Any]:
        self._count(len(items))
        return items

    def read_map(self, entries: dict[Any, Any]) -> Any:
        self._count(len(entries))
        if b"__ndarray__" in entries:
            return _decode_array(entries)
        if b"__npgeneric__" in entries:
            return _decode_scalar(entries)
        return entries

    def _count(self, items: int) -> None:
        self._items += items
        if self._items > MAX_ITEMS:
            raise WireError(f"the message has more than {MAX_ITEMS} entries; send numbers as arrays")


def _encode(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, np.ndarray | np.generic):
        raise WireError(f"a {type(value).__name__} cannot be packed; send numbers, text, lists, maps or arrays")
    dtype = value.dtype.str
    if isinstance(value, np.ndarray):
        _check_dtype(dtype, _ARRAY_DTYPE)
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": dtype, b"shape": value.shape}
    _check_dtype(dtype, _SCALAR_DTYPE)
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": dtype}


def _decode_array(entries: dict[Any, Any]) -> np.ndarray:
    if entries.keys() != _ARRAY_KEYS:
        raise WireError(f"an array has the keys {sorted(map(repr, entries))}; it needs data, dtype and shape")
    data, shape = entries[b"data"], entries[b"shape"]
    dtype = _check_dtype(entries[b"dtype"], _ARRAY_DTYPE)
    if not isinstance(shape, list) or any(type(side) is not int or side < 0 for side in shape):
        raise WireError("the shape of an array is not a list of sides of 0 or more")
    if len(shape) > MAX_DIMENSIONS:
        raise WireError(f"an array has {len(shape)} dimensions; the limit is {MAX_DIMENSIONS}")
    if 0 in shape and max(shape) > MAX_EMPTY_SIDE:
        raise WireError(f"an array without elements has a side of {max(shape)}; the limit is {MAX_EMPTY_SIDE}")
    needed = math.prod(shape) * dtype.itemsize
    if not isinstance(data, bytes) or len(data) != needed:
        given = f"{len(data)} bytes" if isinstance(data, bytes) else f"a {type(data).__name__}"
        raise WireError(f"an array of shape {shape} and dtype {dtype.str} comes with {given}; it needs {needed} bytes")
    _check_elements(data, dtype)
    return np.ndarray(buffer=data, dtype=dtype, shape=shape)


def _check_elements(data: bytes, dtype: np.dtype) -> None:
    """Refuses the bytes that NumPy takes for granted never to meet in a boolean or a text."""
    if dtype.kind == "b" and data.translate(None, b"\0\1"):
        raise WireError("a boolean array has elements other than 0 and 1")
    if dtype.kind == "U" and data:
        code_points = np.frombuffer(data, f"{dtype.byteorder}u4")
        if code_points.max() > _LAST_CODE_POINT:
            raise WireError("a text array has characters beyond Unicode's last")


def _decode_scalar(entries: dict[Any, Any]) -> np.generic:
    if entries.keys() != _SCALAR_KEYS:
        raise WireError(f"a scalar has the keys {sorted(map(repr, entries))}; it needs data and dtype")
    data = entries[b"data"]
    dtype = _check_dtype(entries[b"dtype"], _SCALAR_DTYPE)
    if not _fits(data, dtype):
        raise WireError(f"a scalar of dtype {dtype.str} holds a {type(data).__name__} that it cannot be")
    return dtype.type(data)


def _fits(data: Any, dtype: np.dtype) -> bool:
    if dtype.kind == "b":
        return isinstance(data, bool)
    if dtype.kind == "f":
        return isinstance(data, float) and not float(np.finfo(dtype).max) < abs(data) < math.inf
    return type(data) is int and np.iinfo(dtype).min <= data <= np.iinfo(dtype).max


def _check_dtype(dtype: Any, allowed: re.Pattern[str]) -> np.dtype:
    if not isinstance(dtype, str) or not allowed.fullmatch(dtype):
        shown = dtype[:20] if isinstance(dtype, str) else type(dtype).__name__
        raise WireError(f"dtype {shown!r} is not allowed; use booleans, integers, float16 to float64, or text arrays")
    return np.dtype(dtype)


def _refuse_extension(code: int, data: bytes) -> Any:
    raise WireError(f"msgpack extension type {code} is not allowed")
