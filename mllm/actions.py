"""From action tokens to commands and back, as OpenVLA does it (Kim et al., arXiv 2406.09246, section 3.2).

token ids  --decode-->  values in [-1, 1]  --unnormalise-->  the data set's units  --to command-->    command
token ids  <--encode--  values in [-1, 1]  <--normalise--    the data set's units  <--from command--  command
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mllm.errors import PolicyError


@dataclass(frozen=True)
class ActionTokens:
    """256 uniform bins over [-1, 1], one token each, the last ids of the vocabulary in descending order of value.

    bins: n edges, hence n - 1 intervals with a centre; the published code numbers them 1 to n with `np.digitize`, so
    that the value 1 itself has a token of its own, which decodes to the centre below it.
    vocab: ids that the tokenizer knows (32,000 for OpenVLA: the rows that pad the table to 32,064 do not count).
    """

    bins: int
    vocab: int

    @property
    def edges(self) -> np.ndarray:
        return np.linspace(-1.0, 1.0, self.bins)

    @property
    def centres(self) -> np.ndarray:
        edges = self.edges
        return (edges[:-1] + edges[1:]) / 2.0

    def encode(self, values: np.ndarray) -> np.ndarray:
        """values: any shape, clipped to [-1, 1]. Returns int64 ids of the same shape, `vocab - bins` to `vocab - 1`."""
        return self.vocab - np.digitize(np.clip(np.asarray(values, np.float64), -1.0, 1.0), self.edges)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """ids: any shape and any id; one that is no action token counts as the nearest. Returns float64 centres."""
        return self.centres[np.clip(self.vocab - np.asarray(ids) - 1, 0, self.bins - 2)]


@dataclass(frozen=True)
class ActionStatistics:
    """How a data set's actions were brought to [-1, 1]: `low` and `high` (its 1 % and 99 % quantiles) to -1 and 1.

    mask: False for a number that was left as it was (the gripper).
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    mask: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            numbers = getattr(self, name)
            # Whole numbers of a file may be larger than any float.
            if not all(abs(number) <= sys.float_info.max for number in numbers):
                raise PolicyError(f"action statistics {name} {str(numbers)[:80]}: every number must be finite")
            object.__setattr__(self, name, tuple(float(number) for number in numbers))
        object.__setattr__(self, "mask", tuple(bool(flag) for flag in self.mask) or (True,) * len(self.low))
        if not 1 <= len(self.low) == len(self.high) == len(self.mask) <= 64:
            raise PolicyError(
                f"action statistics have {len(self.low)} low, {len(self.high)} high and {len(self.mask)} mask entries: "
                "they must be equally many, 1 to 64"
            )
        if not (np.asarray(self.low) <= np.asarray(self.high)).all():
            raise PolicyError(f"action statistics {self.low} to {self.high}: no low may lie above its high")

    @classmethod
    def from_json(cls, where: str, entry: Any) -> ActionStatistics:
        """Reads {"q01": [...], "q99": [...], "mask": [...]}, the "action" part of OpenVLA's `dataset_statistics.json`.

        Raises PolicyError naming `where`.
        """
        if not isinstance(entry, Mapping):
            raise PolicyError(f"{where}: action statistics must be an object with 'q01' and 'q99'")
        lists = {key: entry.get(key, [] if key == "mask" else None) for key in ("q01", "q99", "mask")}
        for key, kind in (("q01", (int, float)), ("q99", (int, float)), ("mask", bool)):
            if not isinstance(lists[key], list) or not all(isinstance(value, kind) for value in lists[key]):
                wanted = "booleans" if key == "mask" else "numbers"
                raise PolicyError(f"{where}: '{key}' is {str(lists[key])[:80]}: it must be a list of {wanted}")
        try:
            return cls(tuple(lists["q01"]), tuple(lists["q99"]), tuple(lists["mask"]))
        except PolicyError as error:
            raise PolicyError(f"{where}: {error}") from error

    def to_json(self) -> dict[str, list[float] | list[bool]]:
        return {"q01": list(self.low), "q99": list(self.high), "mask": list(self.mask)}

    def unnormalise(self, values: np.ndarray) -> np.ndarray:
        """values: (..., D) in [-1, 1]. Returns float64 in the data set's units; unmasked numbers pass unchanged."""
        low, high = np.asarray(self.low), np.asarray(self.high)
        return np.where(self.mask, 0.5 * (values + 1) * (high - low) + low, values)

    def normalise(self, actions: np.ndarray) -> np.ndarray:
        """The inverse: actions (..., D) in the data set's units, clipped to [-1, 1] where masked.

        A number that never moves in the data set (low equals high) becomes 0, as its value says nothing.
        """
        low, span = np.asarray(self.low), np.asarray(self.high) - np.asarray(self.low)
        scaled = np.where(span > 0, 2 * (actions - low) / np.where(span > 0, span, 1) - 1, 0.0)
        return np.where(self.mask, np.clip(scaled, -1, 1), actions)


GRIPPERS = ("command", "opening")


def gripper_to_command(action: np.ndarray, gripper: str) -> np.ndarray:
    """(..., D) with the last number as the data set has it. Returns it as `ActionSpec` has it: -1 open, +1 close.

    gripper: "command" (the same already), or "opening" (0 closed, 1 open, as OpenVLA's data sets; the command is
    then -1 or +1 and nothing between, as in OpenVLA's evaluation).
    """
    if gripper == "command":
        return action
    return np.concatenate([action[..., :-1], -np.sign(2 * action[..., -1:] - 1)], axis=-1)


def gripper_from_command(action: np.ndarray, gripper: str) -> np.ndarray:
    """The inverse of `gripper_to_command`, for commands -1 and +1."""
    if gripper == "command":
        return action
    return np.concatenate([action[..., :-1], (1 - action[..., -1:]) / 2], axis=-1)
