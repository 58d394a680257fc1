"""The shape of the code: who may import whom, and what a package must carry."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("quant", "mllm", "sim", "flashvla_ros")  # each may import what stands before it
ROS = (
    "rclpy",
    "std_msgs",
    "sensor_msgs",
    "geometry_msgs",
    "diagnostic_msgs",
    "lifecycle_msgs",
    "rosgraph_msgs",
    "rcl_interfaces",
    "builtin_interfaces",
    "std_srvs",
    "visualization_msgs",
    "launch",
    "launch_ros",
)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_one_way(package):
    later = set(ORDER[ORDER.index(package) + 1 :])
    for path in (ROOT / package).rglob("*.py"):
        assert not imports(path) & later, path


@pytest.mark.parametrize("package", ["quant", "mllm", "sim"])
def test_ros_is_imported_only_by_flashvla_ros_and_launch(package):
    for path in (ROOT / package).rglob("*.py"):
        assert not imports(path) & set(ROS), path


def test_the_command_line_starts_without_importing_ros_torch_or_a_simulator():
    code = (
        "import sys, flashvla_ros.cli; "
        "print([m for m in ('rclpy', 'torch', 'robosuite', 'libero', 'mujoco') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_wheel_carries_what_ros_looks_for(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    data = {name.split(".data/data/")[1] for name in names if ".data/data/" in name}
    assert {f"lib/flashvla_ros/{node}_node" for node in ("camera", "command_gate", "policy", "sim_bridge")} <= data
    assert {
        "share/ament_index/resource_index/packages/flashvla_ros",
        "share/flashvla_ros/package.xml",
        "share/flashvla_ros/launch/libero.launch.py",
        "share/flashvla_ros/launch/robot.launch.py",
        "share/flashvla_ros/launch/fastdds.xml",
        "share/flashvla_ros/launch/config/libero.yaml",
        "share/flashvla_ros/launch/config/robot.yaml",
        "share/flashvla_ros/launch/rviz/libero.rviz",
        "share/flashvla_ros/launch/rviz/robot.rviz",
        "share/flashvla_ros/launch/episodes/libero_spatial_0.safetensors",
    } <= data
    assert {name.split("/")[0] for name in names if not name.split("/")[0].endswith((".data", ".dist-info"))} == set(
        ORDER
    )


def test_no_file_is_large_and_no_weight_is_pickled():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file():
            assert path.stat().st_size < 20_000_000, name
            assert path.suffix not in (".pt", ".pth", ".pkl", ".bin", ".ckpt"), name


def test_package_xml_and_setup_agree_on_name_version_and_licence():
    import xml.etree.ElementTree as ET

    manifest = ET.parse(ROOT / "package.xml").getroot()
    setup = (ROOT / "setup.py").read_text()
    assert manifest.findtext("name") == "flashvla_ros"
    assert f'version="{manifest.findtext("version")}"' in setup
    assert f'license="{manifest.findtext("license")}"' in setup
