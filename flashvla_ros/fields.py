"""Fields of a parameter dataclass and the checks of their values. Without ROS, so that pure code can use them."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from flashvla_ros.errors import ConfigurationError


def param(default: Any, doc: str, *, dynamic: bool = False) -> Any:
    """A dataclass field that becomes a ROS parameter. doc: unit, meaning, what happens if wrong."""
    return dataclasses.field(default=default, metadata={"doc": doc, "dynamic": dynamic})


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Raises ConfigurationError naming the parameter, its value and the rule it breaks."""
    if not condition:
        raise ConfigurationError(f"parameter '{name}' is {value!r}: it must be {rule}")


def require_positive(params: object, *names: str) -> None:
    """Every named field must be a finite number above 0."""
    for name in names:
        value = getattr(params, name)
        require(math.isfinite(value) and value > 0, name, value, "a finite number above 0")


def require_non_negative(params: object, *names: str) -> None:
    """Every named field must be a finite number of 0 or more."""
    for name in names:
        value = getattr(params, name)
        require(math.isfinite(value) and value >= 0, name, value, "a finite number of 0 or more")


def json_object(name: str, text: str) -> dict[str, Any]:
    """A JSON object that came as text. Raises ConfigurationError naming what `name` says it came from."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{name} is {text!r}: it must be a JSON object")
    return value
