"""The graph as data: valid specs, the same for processes and for launch."""

from __future__ import annotations

import importlib
import xml.etree.ElementTree as ET
from typing import get_type_hints

import pytest
import yaml

from flashvla_ros.errors import ConfigurationError
from flashvla_ros.graph import GRAPHS, environment, graph, to_yaml
from flashvla_ros.paths import config_file, fastdds_profile, share_directory


@pytest.mark.parametrize("name", GRAPHS)
def test_every_node_of_a_graph_has_a_module_a_script_and_a_section_in_its_parameter_file(name):
    for spec in graph(name):
        assert callable(importlib.import_module(spec.module).main)
        script = share_directory() / "scripts" / spec.executable
        assert script.stat().st_mode & 0o111
        assert f"from {spec.module} import main" in script.read_text()
        assert spec.name in yaml.safe_load(config_file(spec.config).read_text())


@pytest.mark.parametrize("name", ["libero.yaml", "robot.yaml"])
def test_every_parameter_in_a_parameter_file_exists_and_its_value_is_accepted(name):
    from flashvla_ros.camera_node import CameraParameters
    from flashvla_ros.command_gate_node import GateParameters
    from flashvla_ros.parameters import _coerce
    from flashvla_ros.policy_parameters import PolicyParameters
    from flashvla_ros.sim_bridge_parameters import BridgeParameters

    classes = {
        "camera": CameraParameters,
        "command_gate": GateParameters,
        "policy": PolicyParameters,
        "sim_bridge": BridgeParameters,
    }
    for node, section in yaml.safe_load(config_file(name).read_text()).items():
        values = dict(section["ros__parameters"])
        values.pop("use_sim_time", None)
        cls = classes[node]
        kinds = get_type_hints(cls)
        cls(**{key: _coerce(key, kinds[key], value) for key, value in values.items()})


def test_the_robot_s_camera_gives_one_image_a_period_of_the_gate():
    nodes = yaml.safe_load(config_file("robot.yaml").read_text())
    camera, gate = nodes["camera"]["ros__parameters"], nodes["command_gate"]["ros__parameters"]
    assert camera["rate"] * gate["period"] == pytest.approx(1.0)


def test_overrides_reach_their_node():
    specs = {spec.name: spec for spec in graph("libero", {"policy": {"policy": "replay"}})}
    assert "policy:='replay'" in specs["policy"].arguments()
    assert "policy:='replay'" not in specs["sim_bridge"].arguments()


@pytest.mark.parametrize(("name", "overrides", "said"), [("moon", {}, "moon"), ("libero", {"camera": {}}, "camera")])
def test_unknown_graph_or_node_is_named_with_the_known_ones(name, overrides, said):
    with pytest.raises(ConfigurationError, match=said):
        graph(name, overrides)


@pytest.mark.parametrize("value", [True, 3, 2.5, "a: 'b' # c", "", ["x=y", "it's"], '{"a": 1}'])
def test_values_survive_the_command_line(value):
    assert yaml.safe_load(to_yaml(value)) == value


def test_transport_profile_is_valid_and_chosen_unless_the_user_chose_one():
    root = ET.parse(fastdds_profile()).getroot()
    assert "33554432" in [element.text for element in root.iter() if element.tag.endswith("segment_size")]
    assert environment({})["FASTDDS_DEFAULT_PROFILES_FILE"] == str(fastdds_profile())
    assert environment({"ROS_DISTRO": "humble"})["FASTRTPS_DEFAULT_PROFILES_FILE"] == str(fastdds_profile())
    assert environment({"FASTDDS_DEFAULT_PROFILES_FILE": "mine"})["FASTDDS_DEFAULT_PROFILES_FILE"] == "mine"


def test_launch_files_describe_the_same_nodes():
    pytest.importorskip("launch.actions", reason="ROS's launch package is not installed")
    from launch.actions import OpaqueFunction
    from launch_ros.actions import Node

    from launch import LaunchContext

    for name, specs in GRAPHS.items():
        path = share_directory() / "launch" / f"{name}.launch.py"
        spec = importlib.util.spec_from_file_location("launch_file", path)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        description, context = module.generate_launch_description(), LaunchContext()
        for action in description.entities:
            if type(action).__name__ == "DeclareLaunchArgument":
                action.execute(context)
        nodes = [
            node
            for action in description.entities
            if isinstance(action, OpaqueFunction)
            for node in action.execute(context)
            if isinstance(node, Node)
        ]
        assert [node.node_executable for node in nodes] == [spec.executable for spec in specs]
