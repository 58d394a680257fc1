"""The kernels in `quant/csrc`, which installing the package builds where there is a C compiler.

The fastest set of instructions of the processor is used; the environment variable FLASHVLA_INSTRUCTIONS names another.
All give the same bits.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from quant.errors import QuantError

INSTRUCTIONS = ("portable", "avx2", "avx512", "avx512vnni")
VARIABLE = "FLASHVLA_INSTRUCTIONS"


class Layer(ctypes.Structure):
    """`Layer` of `quant/csrc/msfp.h`; there it says what each field is."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tiles", "tables", "choice", "scale", "bias", "sums")),
        *((name, ctypes.c_int64) for name in ("wide_sums", "channels", "inputs", "planes", "largest")),
        *((name, ctypes.c_double) for name in ("step", "zero")),
        *((name, ctypes.c_int64) for name in ("mantissa", "limit", "is_signed")),
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        ("rows", ctypes.c_int64),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None, after a warning, if they are not built."""
    folder = Path(__file__).parent
    for path in (folder / f"_msfp{suffix}" for suffix in EXTENSION_SUFFIXES):
        if path.exists():
            kernels = ctypes.CDLL(str(path))
            kernels.msfp_linear.argtypes = (ctypes.POINTER(Layer), ctypes.c_int, ctypes.c_int)
            return kernels
    warnings.warn(
        "quant's kernels are not built: packed layers are computed by plain torch, which is exact but slow. With a C "
        "compiler, `python setup.py build_ext --inplace` or installing the package again builds them",
        stacklevel=2,
    )
    return None


def available() -> tuple[str, ...]:
    """Names of the sets of instructions that this processor has, the fastest last; none if nothing is built."""
    kernels = library()
    return INSTRUCTIONS[: kernels.msfp_instructions()] if kernels else ()


@cache
def chosen() -> int:
    """Index in INSTRUCTIONS of those in use. Raises QuantError: FLASHVLA_INSTRUCTIONS names others than this has."""
    names = available()
    name = os.environ.get(VARIABLE, names[-1])
    if name not in names:
        raise QuantError(f"{VARIABLE} is {name!r}: this processor has {', '.join(names)}")
    return names.index(name)


@contextmanager
def instructions(name: str) -> Iterator[None]:
    """Within it, kernels use the named instructions. Raises QuantError: this processor does not have them."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    chosen.cache_clear()
    try:
        chosen()
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before
        chosen.cache_clear()


def run(layer: Layer, threads: int) -> None:
    """Computes `layer.y`. Raises MemoryError: there is none for the quantised inputs."""
    kernels = library()
    if kernels is None:
        raise QuantError("quant's kernels are not built: use PackedLinear, which computes without them")
    if kernels.msfp_linear(layer, chosen(), threads):
        raise MemoryError(f"no memory for {layer.rows} x {layer.inputs} quantised inputs")
