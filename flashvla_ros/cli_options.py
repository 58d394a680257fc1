"""What several commands ask about a policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashvla_ros.fields import json_object


@dataclass(frozen=True)
class PolicyOptions:
    """How a policy is made."""

    options: str = "{}"
    """JSON object: keyword arguments of the policy's constructor."""
    compress: str = ""
    """none, flashvla, tokencarve, fastv, random, uniform, or a JSON object of its settings: which visual tokens the
    decoder goes on with."""
    keep: int | None = None
    """Visual tokens that it keeps."""
    reuse: str = ""
    """off, paper, gated, or a JSON object of its settings: when the policy's last action is used again."""

    def chosen(self) -> dict[str, Any]:
        """The policy's keyword arguments. Raises ConfigurationError: not JSON where it must be."""
        given = {"compress": _name_or_object("--compress", self.compress), "keep": self.keep}
        given["reuse"] = _name_or_object("--reuse", self.reuse)
        return json_object("--options", self.options) | {
            name: value for name, value in given.items() if value not in ("", None)
        }


def _name_or_object(name: str, text: str) -> str | dict[str, Any]:
    return json_object(name, text) if text.lstrip().startswith("{") else text
