"""A linear layer whose weights are small integers, and whose inputs become small integers on the way in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant import native, ops, triton_layer
from quant.errors import QuantError
from quant.formats import FloatFormat, codes_of, integers, round_to_grid
from quant.tiles import CHANNELS, LARGEST, split, tile, untile

INT24, INT32 = (1 << 23) - 1, torch.iinfo(torch.int32).max
FLOAT32 = torch.finfo(torch.float32)

# Scale, zero, mantissa, largest and sign of the grid that each row of inputs has without `Activation`. The scale is for
# kernels to choose, a power of two for each row.
OWN_GRID = (0.0, 0.0, 22, (1 << 22) - 1, True)


@dataclass(frozen=True)
class Activation:
    """How a layer's inputs are kept, one static grid for all of them: x ~ integer * scale + zero.

    scale: above 0.  zero: 0 or less, and 0 for a signed format.  Raises QuantError: other values, or beyond float32.
    """

    format: FloatFormat
    scale: float
    zero: float = 0.0

    def __post_init__(self) -> None:
        if not FLOAT32.tiny <= self.scale <= FLOAT32.max:
            limits = f"{FLOAT32.tiny:.3g} to {FLOAT32.max:.3g}"
            raise QuantError(f"Activation.scale is {self.scale}: it must be a number of float32 above 0, {limits}")
        if not -FLOAT32.max <= self.zero <= 0 or (self.format.signed and self.zero):
            limit = "0, for the format is signed" if self.format.signed else f"0 or less, down to {-FLOAT32.max:.3g}"
            raise QuantError(f"Activation.zero is {self.zero} with {self.format.name}: it must be {limit}")

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest number that an input can have."""
        reach = self.scale * self.format.largest
        return self.zero if not self.format.signed else -reach, self.zero + reach

    @cached_property
    def grid(self) -> tuple[float, float, int, int, bool]:
        """Scale, zero, mantissa, largest and sign, as kernels take them."""
        return self.scale, self.zero, self.format.mantissa, self.format.largest, self.format.signed

    def constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Scale and zero, float32, made where they are used: a CUDA graph records no copy from the host."""
        scale, zero = (torch.full((), value, dtype=torch.float32, device=device) for value in (self.scale, self.zero))
        return scale, zero

    def integers(self, x: Tensor) -> Tensor:
        """The integers of x, float32 of its shape: what `quant.formats.quantise` multiplies by the scale."""
        scale, zero = self.constants(x.device)
        return round_to_grid((x.float() - zero) / scale, self.format)

    def quantise(self, x: Tensor) -> Tensor:
        """What a layer keeps of x, float32 of its shape; see `quant.formats.quantise`."""
        return self.integers(x) * self.scale + self.zero


class PackedLinear(nn.Module):
    """y = x W^T + bias, from codes: W[n, k] = integer of code[n, k] * scale[n] (MSFP, arXiv 2505.21591, by channel).

        y[m, n] = sum_k q_x[m, k] q_w[n, k] * (scale[n] s_x) + (scale[n] z * sum_k q_w[n, k] + bias[n])

    q_x, s_x, z: integers, scale and zero point of the inputs. The sum is exact in whole numbers, and the rest float32,
    each operation rounded, so that every implementation gives the same bits. A row of x with a NaN gives NaN; what lies
    beyond the grid, infinity too, becomes its end. Without `activation` x is not quantised, and the sum is float32; the
    kernels keep x to 2^-22 of its row's largest number, and then a row with an infinity gives NaN too (our choice).

    codes: (N, K) uint8.
    formats: one or more signed ones; choice: (N,) which of them is each channel's.
    scale: (N,) float32, above 0.  bias: (N,) float32 or None.
    Raises QuantError: sizes that do not match, a code outside its format, a scale that is not a finite number above 0.

    x: (..., K), any floating type; y: (..., N), of the same type. No gradient goes through: train by
    `quant.formats.quantise`.
    """

    tiles: Tensor
    choice: Tensor
    scale: Tensor
    bias: Tensor | None
    sums: Tensor
    table: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        formats: Sequence[FloatFormat],
        choice: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        _check(codes, formats, choice, scale, bias)
        self.out_features, self.in_features = codes.shape
        self.formats, self.activation = tuple(formats), activation
        tables = _tables(self.formats).to(codes.device)
        whole = tables[choice.long()[:, None], codes.long()]
        looked_up = max(format.bits for format in formats) <= 4
        if looked_up:
            self.register_buffer("tiles", tile(codes))
        elif not whole.numel() or int(whole.abs().max()) <= LARGEST:
            self.register_buffer("tiles", tile(split(whole)))
        else:
            # Formats of 8 bits have at most 7 significant bits: this holds their integers exactly.
            self.register_buffer("tiles", whole.to(torch.bfloat16))
        short = -self.out_features % CHANNELS
        self.register_buffer("choice", F.pad(choice.to(torch.uint8), (0, short)))
        self.register_buffer("scale", F.pad(scale.float(), (0, short)))
        self.register_buffer("bias", None if bias is None else F.pad(bias.float(), (0, short)))
        table = F.pad(tables, (0, 16 - tables.shape[1])).to(torch.int8) if looked_up else None
        self.register_buffer("table", table, persistent=False)
        self._derive(whole)

    def _derive(self, whole: Tensor) -> None:
        """Sets what follows from the weights' integers: `sums`, of each channel, in the smallest type that holds them;
        `exact`, that no input leaves int24 and no sum int32, for kernels; and `largest`, of tiles' bytes.
        """
        sums = F.pad(whole.sum(1), (0, len(self.choice) - len(whole)))
        reach = int(sums.abs().max()) if len(sums) else 0
        types = (dtype for dtype in (torch.int16, torch.int32, torch.int64) if reach <= torch.iinfo(dtype).max)
        self.register_buffer("sums", sums.to(next(types)), persistent=False)
        longest = int(whole.abs().sum(1).max()) if whole.numel() else 0
        largest = self.activation.format.largest if self.activation else 255
        self.exact = largest <= INT24 and longest * largest <= INT32
        held = whole if self.tiles.dtype is torch.uint8 else self.tiles.int()
        self.largest = int(held.abs().max()) if held.numel() else 0

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        if self.choice.numel() and int(self.choice.max()) >= len(self.formats):
            raise QuantError(f"{prefix}choice holds {int(self.choice.max())}: there are {len(self.formats)} formats")
        self._derive(self.integers())

    def integers(self) -> Tensor:
        """(N, K) int64, the weights' integers."""
        shape = (self.out_features, self.in_features)
        if self.tiles.dtype is torch.bfloat16:
            return self.tiles.long()
        values = untile(self.tiles, shape).long()
        if self.table is not None:
            return self.table[self.choice[: shape[0], None].long(), values].long()
        return sum(plane << 8 * place for place, plane in enumerate(values))

    def codes(self) -> Tensor:
        """(N, K) uint8: the codes that the layer was made of, but for that of negative zero, which becomes zero."""
        # No integer of a format has more significant bits than float32.
        whole = self.integers().float()
        codes = torch.empty(whole.shape, dtype=torch.uint8, device=whole.device)
        for index, format in enumerate(self.formats):
            rows = self.choice[: self.out_features] == index
            codes[rows] = codes_of(whole[rows], format)
        return codes

    def weight(self) -> Tensor:
        """(N, K) float32: the numbers that the codes stand for."""
        return self.integers().float() * self.scale[: self.out_features, None]

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise QuantError("a packed layer has no gradient: use torch.no_grad, or train by quant.formats.quantise")
        if x.shape[-1:] != (self.in_features,):
            raise QuantError(f"inputs have shape {tuple(x.shape)}: the layer takes (..., {self.in_features})")
        if not self.native(x.device):
            return self.reference(x)
        held = self._buffers  # attributes of a module take longer than the kernel of a small layer
        return ops.packed_linear(
            x,
            held["tiles"],
            held["table"],
            held["choice"],
            held["scale"],
            held["bias"],
            held["sums"],
            self.out_features,
            self.largest,
            *(self.activation.grid if self.activation else OWN_GRID),
        )

    def native(self, device: torch.device) -> bool:
        """Whether kernels compute the layer for inputs on a device: there are some, and their int32 sums are exact."""
        held: dict[str, Any] = self._buffers
        if not self.exact or held["scale"].dtype is not torch.float32:
            return False
        if device.type == "cuda":
            return all(format.bits == 4 for format in self.formats) and triton_layer.available(device)
        return device.type == "cpu" and held["tiles"].dtype is not torch.bfloat16 and native.library() is not None

    def reference(self, x: Tensor) -> Tensor:
        """`forward` in plain torch on any device, exact up to sums of 2^53."""
        count = self.out_features
        scale, bias, activation = self.scale[:count], self.bias, self.activation
        bias = torch.zeros_like(scale) if bias is None else bias[:count]
        if activation is None:
            return F.linear(x.float(), self.weight(), bias).to(x.dtype)
        total = F.linear(activation.integers(x).double(), self.integers().double()).float()
        scale_x, zero = activation.constants(scale.device)
        offset = scale * zero * self.sums[:count].float() + bias
        return (total * (scale * scale_x) + offset).to(x.dtype)

    def extra_repr(self) -> str:
        names = "/".join(format.name for format in self.formats)
        inputs = self.activation.format.name if self.activation else "float"
        return f"{self.in_features}, {self.out_features}, weights={names}, inputs={inputs}"


def _tables(formats: Sequence[FloatFormat]) -> Tensor:
    """(formats, codes of the largest) int64: the integer of every code, and 0 beyond a format's codes."""
    tables = [integers(format) for format in formats]
    return torch.stack([F.pad(table, (0, max(map(len, tables)) - len(table))) for table in tables])


def _check(codes: Tensor, formats: Sequence[FloatFormat], choice: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    if codes.ndim != 2 or codes.dtype != torch.uint8:
        raise QuantError(f"codes are {codes.dtype} of shape {tuple(codes.shape)}: they must be uint8 of shape (N, K)")
    for name, value in (("choice", choice), ("scale", scale), ("bias", bias)):
        if value is not None and value.shape != codes.shape[:1]:
            raise QuantError(f"{name} has shape {tuple(value.shape)}: codes of {codes.shape[0]} channels want one each")
    unsigned = [format.name for format in formats if not format.signed]
    if unsigned or not formats:
        raise QuantError(f"the formats of weights are {unsigned or 'none'}: name one or more signed ones")
    if len(choice) and not 0 <= int(choice.min()) <= int(choice.max()) < len(formats):
        raise QuantError(f"choice holds {int(choice.min())} to {int(choice.max())}: there are {len(formats)} formats")
    limits = torch.tensor([format.codes for format in formats], device=codes.device)[choice.long()]
    if bool((codes >= limits[:, None]).any()):
        raise QuantError(f"a code is {int(codes.max())}: the formats {[format.name for format in formats]} have fewer")
    wrong = ~(scale.isfinite() & (scale > 0))
    if bool(wrong.any()):
        raise QuantError(f"scale of channel {int(wrong.nonzero()[0])} is {float(scale[wrong][0])}: it must be above 0")
