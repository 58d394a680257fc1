"""The node graphs, once, as data. `launch/*.launch.py` turns them into launch actions, `flashvla up` into processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flashvla_ros.errors import ConfigurationError
from flashvla_ros.paths import PACKAGE, config_file, fastdds_profile

FAST_DDS_2_DISTROS = ("humble", "iron", "jazzy")  # their Fast DDS reads the profile's older variable name


@dataclass(frozen=True)
class NodeSpec:
    """One node process. config: parameter file; parameters: what overrides it; remappings: from -> to."""

    executable: str
    name: str
    config: str
    namespace: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    remappings: Mapping[str, str] = field(default_factory=dict)

    @property
    def module(self) -> str:
        return f"{PACKAGE}.{self.executable}"

    def arguments(self) -> list[str]:
        """The ROS arguments of the process."""
        arguments = ["--ros-args", "-r", f"__node:={self.name}", "--params-file", str(config_file(self.config))]
        if self.namespace:
            arguments += ["-r", f"__ns:={self.namespace}"]
        for source, target in self.remappings.items():
            arguments += ["-r", f"{source}:={target}"]
        for name, value in self.parameters.items():
            arguments += ["-p", f"{name}:={to_yaml(value)}"]
        return arguments

    def command(self) -> list[str]:
        """The command line that runs the node without `ros2 run`."""
        return [sys.executable, "-m", self.module, *self.arguments()]


# Started in this order, stopped in the reverse: the policy goes first, the gate speaks last to a robot still there.
GRAPHS: dict[str, tuple[NodeSpec, ...]] = {
    "libero": (
        NodeSpec("sim_bridge_node", "sim_bridge", "libero.yaml"),
        NodeSpec("command_gate_node", "command_gate", "libero.yaml"),
        NodeSpec("policy_node", "policy", "libero.yaml"),
    ),
    "robot": (
        NodeSpec("camera_node", "camera", "robot.yaml"),
        NodeSpec("command_gate_node", "command_gate", "robot.yaml"),
        NodeSpec("policy_node", "policy", "robot.yaml"),
    ),
}


def graph(name: str, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[NodeSpec, ...]:
    """The nodes of a graph. overrides: node name -> {parameter: value}.

    Raises ConfigurationError: unknown graph or node.
    """
    if name not in GRAPHS:
        raise ConfigurationError(f"no graph is called '{name}'; there are: {', '.join(GRAPHS)}")
    overrides = dict(overrides or {})
    specs = tuple(
        replace(spec, parameters={**spec.parameters, **overrides.pop(spec.name, {})}) for spec in GRAPHS[name]
    )
    if overrides:
        raise ConfigurationError(
            f"graph '{name}' has no node '{next(iter(overrides))}'; it has: {', '.join(spec.name for spec in specs)}"
        )
    return specs


def to_yaml(value: Any) -> str:
    """A parameter value as ROS reads it on a command line (YAML, one line)."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(to_yaml(item) for item in value) + "]"
    return repr(value)


def environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a node process: the Fast DDS profile with room for images, unless one is already chosen."""
    env = dict(os.environ if base is None else base)
    old = env.get("ROS_DISTRO") in FAST_DDS_2_DISTROS
    env.setdefault(f"{'FASTRTPS' if old else 'FASTDDS'}_DEFAULT_PROFILES_FILE", str(fastdds_profile()))
    if "AMENT_PREFIX_PATH" not in env and (Path(sys.prefix) / "share" / "ament_index").is_dir():
        env["AMENT_PREFIX_PATH"] = sys.prefix  # ROS from PyPI does not set it
    return env
