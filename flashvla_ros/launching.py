"""A node graph as a ROS launch description; `launch/*.launch.py` import it where ROS's launch is installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    OpaqueFunction,
    RegisterEventHandler,
    SetEnvironmentVariable,
)
from launch.conditions import IfCondition
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from flashvla_ros.graph import NodeSpec, environment, graph
from flashvla_ros.paths import PACKAGE, config_file, share_directory
from launch import LaunchContext, LaunchDescription


def describe(graph_name: str, arguments: Mapping[str, tuple[str, str, str]]) -> LaunchDescription:
    """The launch description of a graph.

    arguments: launch argument -> (node, parameter, meaning); not given, the parameter files decide. `config:=FILE`
    adds a parameter file over the graph's own, `rviz:=true` opens rviz. When one node ends, the others are shut down:
    none is of use alone.
    """

    def nodes(context: LaunchContext) -> list[Any]:
        given: dict[str, dict[str, Any]] = {}
        for argument, (node, parameter, _) in arguments.items():
            value = LaunchConfiguration(argument).perform(context)
            if value:
                given.setdefault(node, {})[parameter] = ParameterValue(value, value_type=str)  # not parsed as YAML
        config = LaunchConfiguration("config").perform(context)
        return [action for spec in graph(graph_name, given) for action in _node_actions(spec, config)]

    return LaunchDescription(
        [
            *(
                SetEnvironmentVariable(name, value)
                for name, value in environment().items()
                if name.endswith("_DEFAULT_PROFILES_FILE")
            ),
            DeclareLaunchArgument("config", default_value="", description="parameter file over the graph's own"),
            DeclareLaunchArgument("rviz", default_value="false", description="open rviz"),
            *(
                DeclareLaunchArgument(
                    name, default_value="", description=f"{meaning}; empty: as the parameter files say"
                )
                for name, (_, _, meaning) in arguments.items()
            ),
            OpaqueFunction(function=nodes),
            Node(
                package="rviz2",
                executable="rviz2",
                output="log",
                condition=IfCondition(LaunchConfiguration("rviz")),
                arguments=["-d", str(share_directory() / "launch" / "rviz" / f"{graph_name}.rviz")],
            ),
        ]
    )


def _node_actions(spec: NodeSpec, config: str) -> list[Any]:
    node = Node(
        package=PACKAGE,
        executable=spec.executable,
        name=spec.name,
        namespace=spec.namespace,
        output="screen",
        parameters=[str(config_file(spec.config)), *([config] if config else []), dict(spec.parameters)],
        remappings=list(spec.remappings.items()),
    )
    ended = EmitEvent(event=Shutdown(reason=f"node '{spec.name}' ended"))
    return [node, RegisterEventHandler(OnProcessExit(target_action=node, on_exit=ended))]
