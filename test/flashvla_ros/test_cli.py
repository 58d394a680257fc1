"""The `flashvla` command as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rosbags.highlevel import AnyReader

from flashvla_ros.cli import parse_overrides
from flashvla_ros.errors import ConfigurationError
from flashvla_ros.paths import demo_episode

REPLAY = ("--episode", demo_episode(), "--set", "sim_bridge.image_size=64")
FLASHVLA = [sys.executable, "-m", "flashvla_ros.cli"]


def run(*arguments, timeout=180, **options):
    return subprocess.run(
        [*FLASHVLA, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, check=False, **options
    )


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_demo_ends_in_success_with_a_readable_bag_and_video(ros_environment, tmp_path):
    result = run("demo", "--json", "--runs", tmp_path, *REPLAY)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["outcome"] == "success"
    steps = report["steps"]
    assert set(report["milliseconds"]) == {"physics", "render", "policy", "gate", "transport", "step"}
    assert all(np.isfinite(stage["p50"]) for stage in report["milliseconds"].values())
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "result.json").read_text()) == report
    with AnyReader([folder / "bag"]) as bag:
        counts = {connection.topic: connection.msgcount for connection in bag.connections}
        wrist = [c for c in bag.connections if c.topic == "/wrist/image_raw"]
        stamps = [
            (lambda s: s.sec * 10**9 + s.nanosec)(bag.deserialize(data, c.msgtype).header.stamp)
            for c, _, data in bag.messages(wrist)
        ]
    for topic in ("/agentview/image_raw", "/wrist/image_raw", "/eef_pose", "/joint_states", "/command"):
        assert counts[topic] >= steps + (topic != "/command"), topic
    assert counts["/sim_bridge/step"] == steps
    assert counts["/sim_bridge/outcome"] == 1
    assert set(np.diff(stamps)) == {50_000_000}
    assert (folder / "cameras.mp4").stat().st_size > 1000
    assert len(np.load(folder / "trace.npz")["states"]) == steps + 1


def test_the_shipped_policy_solves_a_task_from_its_cameras_through_ros(ros_environment, tmp_path):
    result = run("demo", "--json", "--runs", tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["outcome"] == "success"
    assert report["facts"]["renderer"] == "fast"
    assert 20 < report["steps"] < 220


def test_an_interrupted_demo_stops_its_nodes_and_says_so_without_a_traceback(ros_environment, tmp_path):
    process = subprocess.Popen([*FLASHVLA, "demo", "--json", "--runs", str(tmp_path)], stdout=-1, stderr=-1, text=True)
    while len(children(process.pid)) < 3:
        assert process.poll() is None
        os.sched_yield()
    nodes = children(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "flashvla: interrupted" in errors
    assert "Traceback" not in errors
    assert not any(alive(pid) for pid in nodes)


def test_demo_whose_disk_is_full_fails_and_says_so(ros_environment, tmp_path):
    import resource

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    result = run("demo", "--runs", tmp_path, *REPLAY, preexec_fn=limit_files)
    assert result.returncode == 1
    assert "File too large" in result.stdout.replace("\n", " ")
    assert "SUCCESS" in result.stdout  # the episode itself went on


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--episode", "/nowhere"], "/nowhere"),
        (["demo", "--policy", "/nowhere"], "/nowhere"),
        (["demo", "--task", "77"], "77"),
        (["train", "/nowhere.yaml"], "/nowhere.yaml"),
        (["dagger", "/nowhere.yaml"], "/nowhere.yaml"),
        (["up", "moon"], "moon"),
        (["up", "libero", "--set", "x"], "'x'"),
        (["fly"], "fly"),
        (["bench", "ros", "--steps", "many"], "many"),
        (["serve", "hold", "--host", "0.0.0.0"], "token"),
        (["serve", "hold", "--options", "[]"], "--options"),
        (["serve", "nobody"], "nobody"),
        (["bench", "model", "--model", "huge"], "huge"),
    ],
)
def test_wrong_usage_ends_with_status_2_and_says_what(arguments, said):
    result = run(*arguments)
    assert result.returncode == 2
    assert said in result.stderr + result.stdout
    assert "Traceback" not in result.stderr


def test_help_of_every_command_is_there():
    for arguments in (
        [],
        ["demo"],
        ["up"],
        ["bench", "ros"],
        ["bench", "sim"],
        ["bench", "model"],
        ["record"],
        ["serve"],
        ["train"],
        ["dagger"],
    ):
        result = run(*arguments, "--help")
        assert result.returncode == 0
        assert "usage: flashvla" in result.stdout


def up_robot(tmp_path):
    """`flashvla up robot` on a folder of one image, with its three nodes running."""
    import cv2

    cv2.imwrite(str(tmp_path / "frame.png"), np.zeros((8, 8, 3), np.uint8))
    process = subprocess.Popen(
        [*FLASHVLA, "up", "robot", "--set", f"camera.source={tmp_path}"], stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if "active; instruction" in line:
            return process, children(process.pid)
    raise AssertionError("the graph did not start")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_ends_in_order_on_a_signal(ros_environment, tmp_path, number):
    process, nodes = up_robot(tmp_path)
    assert len(nodes) == 3
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert not any(alive(pid) for pid in nodes)


def test_no_node_outlives_a_killed_parent(ros_environment, tmp_path):
    process, nodes = up_robot(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)  # returns once the last node has closed the pipe it inherited
    for pid in nodes:
        fd = os.pidfd_open(pid) if alive(pid) else None
        if fd is not None:
            import select

            assert select.select([fd], [], [], 20)[0], f"node process {pid} is still there"


def test_up_stops_the_others_when_one_node_ends(ros_environment, tmp_path):
    process, nodes = up_robot(tmp_path)
    os.kill(nodes[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "ended by itself with status -9" in errors
    assert not any(alive(pid) for pid in nodes)


def test_overrides_are_yaml_by_node_and_parameter():
    parsed = parse_overrides(("policy.cameras=[a=b]", "policy.sync_slop=0.1", "camera.loop=true"))
    assert parsed == {"policy": {"cameras": ["a=b"], "sync_slop": 0.1}, "camera": {"loop": True}}


@pytest.mark.parametrize("setting", ["policy", "policy.x", ".x=1", "policy.=1", "policy.x=[1"])
def test_malformed_override_is_refused(setting):
    with pytest.raises(ConfigurationError, match="--set"):
        parse_overrides((setting,))


def test_output_that_nobody_reads_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([*FLASHVLA, "--help"], stdout=write, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(write)
    assert (result.returncode, result.stderr) == (1, b"")


def test_output_that_a_full_disk_does_not_take_is_one_line():
    with open("/dev/full", "w") as full:
        result = subprocess.run([*FLASHVLA, "--help"], stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stderr == b"flashvla: cannot print the rest: [Errno 28] No space left on device\n"
