"""What of a model is quantised, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from quant.errors import QuantError
from quant.search import FAMILIES

BITS = (4, 6, 8)


@dataclass(frozen=True)
class MSFPConfig:
    """How `quant.convert.quantize_` treats the linear layers of a model.

    bits: of weights, 4, 6 or 8.  act_bits: of inputs; None leaves them as they come.
    family: "msfp" (floating point, without a sign where the inputs are anomalous), or what it is compared with; see
        `quant.search`.
    ends: at least so many bits in the layers that run first and last (8, as quantised models usually have it).
    compensate: whether weights are rounded so that they and the bias make up for what rounding costs the output, which
        takes another look at what calibration saw; see `quant.compensate`. Else each goes to the nearest number.

    The rest maps patterns of layers' names ("decoder.*.fc2", as in a shell) to what holds there; the first one that
    fits counts.
    least: at least so many bits, of weights and of inputs.
    exclude: why a layer stays as it is.
    anomalous: whether its inputs may drop their sign; where nothing fits, what calibration saw decides.
    Raises QuantError: another number of bits, an unknown family, or a reason that is no text.
    """

    bits: int = 4
    act_bits: int | None = 4
    family: str = "msfp"
    ends: int = 8
    compensate: bool = True
    least: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    exclude: Mapping[str, str] = field(default_factory=dict)
    anomalous: Mapping[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        inputs = BITS[-1] if self.act_bits is None else self.act_bits
        given: dict[str, Any] = {"bits": self.bits, "act_bits": inputs, "ends": self.ends}
        for pattern, least in self.least.items():
            if not isinstance(least, (tuple, list)) or len(least) != 2:
                raise QuantError(f"MSFPConfig.least['{pattern}'] is {least!r}: give the bits of weights and of inputs")
            given |= {f"least['{pattern}'][{place}]": value for place, value in enumerate(least)}
        for name, value in given.items():
            if isinstance(value, bool) or value not in BITS:
                raise QuantError(f"MSFPConfig.{name} is {value!r}: choose one of {', '.join(map(str, BITS))}")
        if not isinstance(self.compensate, bool):
            raise QuantError(f"MSFPConfig.compensate is {self.compensate!r}: it must be true or false")
        if self.family not in FAMILIES:
            raise QuantError(f"MSFPConfig.family is {self.family!r}: choose one of {', '.join(FAMILIES)}")
        for name, kind in (("exclude", str), ("anomalous", bool)):
            for pattern, value in getattr(self, name).items():
                if not isinstance(value, kind) or value == "":
                    what = "say why" if kind is str else "it must be true or false"
                    raise QuantError(f"MSFPConfig.{name}['{pattern}'] is {value!r}: {what}")

    def bits_of(self, name: str, end: bool = False) -> tuple[int, int | None]:
        """Bits of a layer's weights and of its inputs; end: whether it runs first or last."""
        least = self.ends if end else 0
        weights, inputs = find(self.least, name, (0, 0))
        if self.act_bits is None:
            return max(self.bits, least, weights), None
        return max(self.bits, least, weights), max(self.act_bits, least, inputs)


def find(patterns: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """What the first pattern that fits the name maps to."""
    return next((value for pattern, value in patterns.items() if fnmatchcase(name, pattern)), default)
