"""ROS parameters as frozen dataclasses: declared, read and checked in one place.

A node's parameters are the fields of a frozen dataclass made with `fields.param`; its `__post_init__` checks values, so
one set of checks serves start-up and run time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar, get_type_hints

from rcl_interfaces.msg import ParameterDescriptor, SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter

from flashvla_ros.errors import ConfigurationError

P = TypeVar("P")

# Parameters that rclpy itself declares, or that ROS tools may set on any node.
ROS_OWN_PARAMETERS = ("use_sim_time", "start_type_description_service", "qos_overrides.")


def _coerce(name: str, kind: Any, value: Any) -> Any:
    """Turns a ROS value into the dataclass field's type; YAML reads `rate: 20` and `task: 0` as integers."""
    if kind in (float, str) and isinstance(value, int) and not isinstance(value, bool):
        return kind(value)
    if kind is str and value is False:
        return "off"  # what YAML reads as false
    if kind == tuple[str, ...]:
        items = list(value) if isinstance(value, (list, tuple)) else None
        # An empty YAML list reaches a node as [''] or as a list of no type.
        if items is not None and all(isinstance(item, str) for item in items):
            return tuple(item for item in items if item)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    type_name = getattr(kind, "__name__", str(kind)) if kind != tuple[str, ...] else "list of strings"
    raise ConfigurationError(f"parameter '{name}' is {value!r}: it must be a {type_name}")


def _to_ros(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class NodeParameters(Generic[P]):
    """The live parameters of one node.

    on_change: called with the new values before they hold; a ConfigurationError of its refuses them.
    node: made with `automatically_declare_parameters_from_overrides=True`, so that a misspelt name is noticed.
    Raises ConfigurationError: unknown name, wrong type, or a value that `cls` refuses.
    """

    def __init__(self, node: Node, cls: type[P], on_change: Callable[[P], None] | None = None) -> None:
        self._cls = cls
        self._on_change = on_change
        self._kinds = get_type_hints(cls)
        self._fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        self.value = self._declare(node)
        node.add_on_set_parameters_callback(self._set)

    def _declare(self, node: Node) -> P:
        given = {name: p.value for name, p in node.get_parameters_by_prefix("").items()}
        unknown = sorted(n for n in given if n not in self._fields and not n.startswith(ROS_OWN_PARAMETERS))
        if unknown:
            raise ConfigurationError(
                f"node '{node.get_name()}' has no parameter {', '.join(map(repr, unknown))}; "
                f"it has: {', '.join(sorted(self._fields))}"
            )
        values = {}
        for name, field in self._fields.items():
            value = _coerce(name, self._kinds[name], given.get(name, field.default))
            values[name] = value
            descriptor = ParameterDescriptor(
                description=field.metadata["doc"], dynamic_typing=True, read_only=not field.metadata["dynamic"]
            )
            if node.has_parameter(name):
                node.undeclare_parameter(name)
            node.declare_parameter(
                name, _to_ros(value) or ([""] if isinstance(value, tuple) else value), descriptor, ignore_override=True
            )
        return self._cls(**values)

    def _set(self, parameters: list[Parameter]) -> SetParametersResult:
        changes = {}
        try:
            for parameter in parameters:
                if parameter.name in self._fields:
                    changes[parameter.name] = _coerce(parameter.name, self._kinds[parameter.name], parameter.value)
            value = dataclasses.replace(self.value, **changes)  # type: ignore[type-var]
            if changes and self._on_change:
                self._on_change(value)
        except ConfigurationError as error:
            return SetParametersResult(successful=False, reason=str(error))
        self.value = value
        return SetParametersResult(successful=True)
