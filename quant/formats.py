"""Number formats of 2 to 8 bits: floating point with a real scale and, unsigned, a real zero point (MSFP, arXiv
2505.21591), and its special case E1My, which is an integer grid.

Every number is an exact integer times a scale, which is what a layer computes with:

    signed ExMy     x ~ integer * scale           1 + exponent + mantissa bits
    unsigned uExMy  x ~ integer * scale + zero    exponent + mantissa bits

There is no infinity, no NaN and no negative zero. A code has its fields in natural order: sign, exponent, mantissa.
Rounding is to the nearest integer of the grid; a tie goes to the even multiple of the step there (the paper's
Q(X) = v round(u / v), with torch's round). What lies outside the grid becomes its end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.errors import QuantError


@dataclass(frozen=True, order=True)
class FloatFormat:
    """ExMy or uExMy.

    exponent: 1 to 5 bits; with 1 the grid is the integers (E1M2 is -7..7, uE1M3 is 0..15).
    mantissa: 0 to 7 bits.  signed: one bit more, for the sign.
    Raises QuantError: other sizes, or not 2 to 8 bits together.
    """

    exponent: int
    mantissa: int
    signed: bool = True

    def __post_init__(self) -> None:
        for name, low, high in (("exponent", 1, 5), ("mantissa", 0, 7)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise QuantError(f"FloatFormat.{name} is {value!r}: it must be a whole number from {low} to {high}")
        if not 2 <= self.bits <= 8:
            raise QuantError(f"the format {self.name} has {self.bits} bits: choose one of 2 to 8")

    @classmethod
    def parse(cls, name: str) -> FloatFormat:
        """From its name, such as "E2M1" or "uE2M2". Raises QuantError: not a format's name."""
        found = re.fullmatch(r"(u?)E(\d)M(\d)", name) if isinstance(name, str) else None
        if found is None:
            raise QuantError(f"{name!r} is no number format: write E2M1 or, without a sign, uE2M2")
        return cls(int(found[2]), int(found[3]), not found[1])

    @property
    def name(self) -> str:
        return f"{'' if self.signed else 'u'}E{self.exponent}M{self.mantissa}"

    @property
    def bits(self) -> int:
        return self.exponent + self.mantissa + self.signed

    @property
    def largest(self) -> int:
        """Integer of the largest number."""
        return ((2 << self.mantissa) - 1) << ((1 << self.exponent) - 2)

    @property
    def unit(self) -> float:
        """Of a number's least step, the multiple at which the steps begin to widen: 2^mantissa."""
        return float(1 << self.mantissa)

    @property
    def one_byte(self) -> bool:
        """Whether its integers fit in a byte."""
        return self.largest <= (127 if self.signed else 255)

    @property
    def codes(self) -> int:
        return 1 << self.bits

    def scale(self, maxval: Tensor) -> Tensor:
        """maxval: what the largest number stands for (above the zero point, if unsigned). Returns the step, float32."""
        return maxval.float() / self.largest


@dataclass(frozen=True, eq=False)
class RowFormats:
    """Signed formats, one for each row of a matrix, as `quantise` reads them; largest, unit: (N, 1) float32."""

    largest: Tensor
    unit: Tensor
    signed: ClassVar[bool] = True

    @classmethod
    def of(cls, formats: Sequence[FloatFormat], choice: Tensor) -> RowFormats:
        """choice: (N,), which of the formats each row has."""
        table = torch.tensor([[float(one.largest), one.unit] for one in formats], device=choice.device)
        return cls(*table[choice.long()].split(1, 1))


@cache
def _integers(format: FloatFormat) -> Tensor:
    magnitudes = torch.arange(1 << (format.exponent + format.mantissa), dtype=torch.int64)
    exponents, fractions = magnitudes >> format.mantissa, magnitudes & ((1 << format.mantissa) - 1)
    normal = ((1 << format.mantissa) + fractions) << (exponents - 1).clamp(min=0)
    positive = torch.where(exponents > 0, normal, fractions)
    return torch.cat((positive, -positive)) if format.signed else positive


def integers(format: FloatFormat, device: torch.device | str = "cpu") -> Tensor:
    """The integer of every code, (2^bits,) int64, in units of the format's smallest step.

    E2M1: 0 1 2 3 4 6 8 12 and their negatives. The code of negative zero is never written, and reads as 0.
    """
    return _integers(format).to(device, copy=True)


def round_to_grid(ratio: Tensor, format: FloatFormat | RowFormats) -> Tensor:
    """ratio: float32, in units of the smallest step. Returns the format's nearest integer as float32; NaN stays NaN."""
    ratio = ratio.clamp(-format.largest if format.signed else 0, format.largest)  # type: ignore[arg-type]
    # The power of two below a number is its exponent's bits alone; below 2^mantissa the step does not shrink further.
    power = (ratio.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=format.unit)
    step = power.mul_(1 / format.unit)
    # Adding zero makes negative zero positive.
    return (ratio / step).round_().mul_(step).add_(0.0)


def quantise(x: Tensor, format: FloatFormat | RowFormats, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Fake quantisation: x as the format would keep it.

    x: any shape, computed in float32.
    scale: float32, above 0, one or what broadcasts to x, such as (N, 1) for the N output channels of a weight.
    zero: the same, what code 0 stands for; for unsigned formats alone, whose numbers start there.
    Returns float32 of x's shape: `round_to_grid((x - zero) / scale) * scale + zero`, each operation rounded to
    float32. The gradient passes straight through where x lies within the grid, and is 0 beyond its ends.
    """
    return _Quantise.apply(x.float(), format, scale, zero)


class _Quantise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, format: FloatFormat | RowFormats, scale: Tensor, zero: Tensor | None) -> Tensor:
        ratio = (x if zero is None else x - zero) / scale
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((ratio <= format.largest) & (ratio >= (-format.largest if format.signed else 0)))
        value = round_to_grid(ratio, format) * scale
        return value if zero is None else value + zero

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


def encode(x: Tensor, format: FloatFormat, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """The codes of `quantise`'s numbers; see there. Returns uint8 of x's shape. Raises QuantError: x has a NaN."""
    x = x.float()
    if x.isnan().any():
        raise QuantError(f"{int(x.isnan().sum())} of {x.numel()} numbers are NaN: {format.name} has no code for it")
    return codes_of(round_to_grid((x if zero is None else x - zero) / scale, format), format)


def codes_of(whole: Tensor, format: FloatFormat) -> Tensor:
    """The inverse of `integers`. whole: float32, integers of the format. Returns uint8 of its shape."""
    half = 1 << (format.exponent + format.mantissa)
    codes = torch.searchsorted(integers(format, whole.device)[:half].float(), whole.abs())
    return (codes + half * (whole < 0)).to(torch.uint8)


def decode(codes: Tensor, format: FloatFormat, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """codes: uint8, below 2^bits.  scale, zero: see `quantise`. Returns float32, equal to `quantise` bit for bit."""
    value = integers(format, codes.device).float()[codes.long()] * scale
    return value if zero is None else value + zero


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes: (..., K) uint8, below 2^bits; bits: 4, 6 or 8. Returns (..., ceil(K * bits / 8)) uint8.

    Codes follow one another from the lowest bit of the first byte: of two of 4 bits the even one is the low nibble.
    What is left of the last byte is 0. Raises QuantError: a code of more bits.
    """
    size = packed_size(codes.shape[-1], bits)
    if codes.numel() and int(codes.max()) >> bits:
        raise QuantError(f"a code is {int(codes.max())}: one of {bits} bits is below {1 << bits}")
    return _regroup(codes, bits, 8)[..., :size].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack` for `count` codes. Returns (..., count) uint8. Raises QuantError: another size."""
    size = packed_size(count, bits)
    if packed.shape[-1] != size:
        raise QuantError(f"{count} codes of {bits} bits take {size} bytes: {packed.shape[-1]} were given")
    return _regroup(packed, 8, bits)[..., :count].contiguous()


def packed_size(count: int, bits: int) -> int:
    """Bytes of so many codes. Raises QuantError: not 4, 6 or 8 bits."""
    if bits not in (4, 6, 8):
        raise QuantError(f"codes of {bits} bits cannot be packed: choose 4, 6 or 8")
    return -(-count * bits // 8)


def _regroup(stream: Tensor, bits: int, wanted: int) -> Tensor:
    """(..., n) uint8, numbers of `bits` bits. Returns the same bits as numbers of `wanted` bits, zeros behind them."""
    together = math.lcm(bits, wanted)
    short = -stream.shape[-1] % (together // bits)
    groups = F.pad(stream, (0, short)).to(torch.int32).unflatten(-1, (-1, together // bits))
    words = (groups << torch.arange(0, together, bits, dtype=torch.int32, device=stream.device)).sum(-1)
    parts = words[..., None] >> torch.arange(0, together, wanted, device=stream.device)
    return (parts & ((1 << wanted) - 1)).to(torch.uint8).flatten(-2)
