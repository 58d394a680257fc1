"""The whole LIBERO graph: real processes, real simulator, real transport."""

from __future__ import annotations

import json
import signal
import time

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, TwistStamped
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_srvs.srv import SetBool, Trigger

from flashvla_ros.diagnostics import values_of
from flashvla_ros.messages import gripper_message, read_twist, stamp_ns, twist_message
from flashvla_ros.monitor import OUTCOME_TOPIC, EpisodeMonitor
from flashvla_ros.paths import demo_episode
from flashvla_ros.qos import LATCHED
from mllm.policy import HoldPolicy
from mllm.recording import load_recording
from mllm.replay import ReplayPolicy
from sim.env import EnvConfig, LiberoEnv
from sim.rollout import rollout

REPLAY = {"policy": "replay", "policy_options": json.dumps({"episode": str(demo_episode()), "after_end": "hold"})}
SMALL = {"image_size": 32}


@pytest.fixture
def monitor(ros):
    node = EpisodeMonitor(context=ros.context)
    ros.add(node)
    yield node
    node.destroy_node()


def outcome_of(ros, monitor, limit=120.0):
    return ros.wait(lambda: monitor.outcome, limit, "for the outcome")


def test_episode_through_ros_equals_the_in_process_rollout_in_every_state(ros, nodes, monitor, tmp_path):
    trace = tmp_path / "trace.npz"
    nodes.start("libero", sim_bridge={**SMALL, "trace_file": str(trace)}, policy=REPLAY)
    assert outcome_of(ros, monitor).outcome == "success", nodes.output()
    env = LiberoEnv(EnvConfig(cameras=(), stepper="fast"))
    try:
        episode = rollout(env, ReplayPolicy(str(demo_episode())), 0, record_states=True)
    finally:
        env.close()
    through_ros = np.load(trace)
    assert episode.outcome == "success"
    np.testing.assert_array_equal(through_ros["actions"], episode.actions)
    assert np.abs(through_ros["states"] - episode.states).max() == 0.0
    assert json.loads(str(through_ros["header"]))["stepper"] == "fast"


def test_a_second_episode_after_a_reset_equals_the_first(ros, nodes, monitor, tmp_path):
    traces = []
    for number in range(2):
        monitor.outcome = None
        if number == 0:
            nodes.start("libero", sim_bridge={**SMALL, "trace_file": str(tmp_path / "trace.npz")}, policy=REPLAY)
        else:
            assert ros.call(Trigger, "/sim_bridge/reset", Trigger.Request()).success
        assert outcome_of(ros, monitor).outcome == "success"
        traces.append(np.load(tmp_path / "trace.npz")["states"])
    np.testing.assert_array_equal(traces[0], traces[1])
    stamps = sorted(monitor.steps)
    assert np.diff(stamps).min() >= 50_000_000  # the clock did not go back between them


def test_a_thousand_steps_lose_no_observation_and_no_command(ros, nodes, monitor):
    images = ros.listen(Image, "/wrist/image_raw", 1000)
    for kind, topic in ((Image, "/agentview/image_raw"), (PoseStamped, "/eef_pose"), (Clock, "/clock")):
        ros.listen(kind, topic)
    nodes.start("libero", sim_bridge={**SMALL, "step_limit": 1000, "receivers": 3})
    assert outcome_of(ros, monitor, 280).outcome == "failure", nodes.output()  # holding still for 1,000 steps
    ros.wait(lambda: len(monitor.table()["step"]) == 1000)
    ros.wait(lambda: len(images) == 1001)
    stamps = [stamp_ns(image.header.stamp) for image in images]
    assert set(np.diff(stamps)) == {50_000_000}
    assert set(monitor.gate_verdicts.values()) == {"passed"}
    assert sorted(monitor.gate_verdicts)[:1000] == stamps[:-1]  # the last observation asks for no step


def test_killed_policy_leads_to_the_safe_command_and_a_clear_end(ros, nodes, monitor):
    twists = ros.listen(TwistStamped, "/command")
    limit = 1.0
    group = nodes.start(
        "libero",
        sim_bridge={**SMALL, "lockstep_timeout": 4.0},
        policy={**REPLAY},
        command_gate={"command_timeout": limit, "observation_timeout": 10.0},
    )
    ros.wait(lambda: monitor.stepped() >= 10, 60)
    group.processes["policy"].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    ros.wait(lambda: not np.any(read_twist(twists[-1])), what="for the zero twist")
    assert time.monotonic() - killed < limit + 1.0
    outcome = outcome_of(ros, monitor)
    assert outcome.outcome == "error"
    assert "no command answered the observation" in outcome.facts["error"]


def test_killed_bridge_leaves_a_stopped_gate_and_an_idle_policy(ros, nodes, monitor):
    twists, proposals = ros.listen(TwistStamped, "/command"), ros.listen(TwistStamped, "/policy/command")
    group = nodes.start(
        "libero", sim_bridge=SMALL, policy=REPLAY, command_gate={"command_timeout": 1.0, "observation_timeout": 1.0}
    )
    ros.wait(lambda: monitor.stepped() >= 10, 60)
    group.processes["sim_bridge"].send_signal(signal.SIGKILL)
    ros.wait(lambda: not np.any(read_twist(twists[-1])), what="for the zero twist")
    ros.drain()
    count = len(proposals)
    diagnostics = ros.listen(DiagnosticArray, "/diagnostics")
    ros.wait(lambda: sum(m.status[0].name == "policy" for m in diagnostics) >= 2)
    assert len(proposals) == count
    assert group.ended().keys() == {"sim_bridge"}


def test_failing_policy_is_an_error_that_says_why_not_a_failure(ros, nodes, monitor):
    recording = load_recording(demo_episode())
    options = json.dumps({"episode": str(demo_episode())})  # after its end the replay is an error of the policy
    nodes.start(
        "libero",
        sim_bridge={**SMALL, "task": "9", "lockstep_timeout": 3.0},
        policy={"policy": "replay", "policy_options": options},
    )
    outcome = outcome_of(ros, monitor)
    assert outcome.outcome == "error"
    assert f"the recording has {len(recording.actions)} actions" in outcome.facts["error"]


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"suite": "libero_moon"}, "libero_moon"),
        ({"task": "10"}, "libero_spatial has no task 10"),
        ({"task": "fly"}, "no task called 'fly'"),
        ({"init_state": "50"}, "init_state"),
        ({"init_state": "-1"}, "init_state"),
        ({"mode": "lockstop"}, "lockstop"),
        ({"image_size": 0}, "image_size"),
        ({"cameras": ["overhead=top"]}, "overhead"),
    ],
)
def test_wrong_bridge_parameter_ends_the_node_with_status_2_naming_it(nodes, parameters, said):
    bridge = {**SMALL, "before_episode": [""], "mode": "realtime", **parameters}
    group = nodes.start("libero", only=("sim_bridge",), sim_bridge=bridge)
    assert group.processes["sim_bridge"].wait(60) == 2
    group.stop()
    assert said in nodes.output()
    assert "Traceback" not in nodes.output()


def test_wrong_initial_state_is_refused_at_run_time_and_the_next_episode_works(ros, nodes, monitor):
    from rcl_interfaces.srv import SetParameters
    from rclpy.parameter import Parameter

    def set_init_state(value):
        request = SetParameters.Request(parameters=[Parameter("init_state", value=value).to_parameter_msg()])
        return ros.call(SetParameters, "/sim_bridge/set_parameters", request).results[0]

    nodes.start("libero", sim_bridge=SMALL, policy=REPLAY)
    assert outcome_of(ros, monitor).outcome == "success"
    for wrong in ("first", "999"):
        refused = set_init_state(wrong)
        assert not refused.successful
        assert f"'{wrong}'" in refused.reason
    monitor.outcome = None
    ros.call(Trigger, "/sim_bridge/reset", Trigger.Request())
    assert outcome_of(ros, monitor).outcome == "success"


@pytest.mark.parametrize("on_silence", ["zero", "hold"])
def test_realtime_goes_on_without_a_policy_and_holds_or_zeroes_the_last_command(
    ros, nodes, monitor, tmp_path, on_silence
):
    trace = tmp_path / "trace.npz"
    nodes.start(
        "libero",
        only=("sim_bridge",),
        sim_bridge={
            **SMALL,
            "mode": "realtime",
            "on_silence": on_silence,
            "step_limit": 60,
            "before_episode": [""],
            "trace_file": str(trace),
        },
    )
    twists = ros.node.create_publisher(TwistStamped, "/command", 10)
    grippers = ros.node.create_publisher(JointState, "/gripper_command", 10)
    ros.wait(lambda: monitor.stepped() >= 5, 60)
    stamp = ros.node.get_clock().now().to_msg()
    grippers.publish(gripper_message(0.0, stamp))
    twists.publish(twist_message(np.array([0.25, 0, 0]), np.zeros(3), stamp, "world"))
    assert outcome_of(ros, monitor).outcome == "failure"
    moves = np.load(trace)["actions"][:, 0]
    moved = np.flatnonzero(moves)
    assert moved.size
    assert moves[moved[0]] == np.float32(0.25)
    if on_silence == "zero":
        assert moved.size == 1
    else:
        assert moved.size == 60 - moved[0]


def test_pause_stops_the_steps_and_resuming_goes_on(ros, nodes, monitor):
    nodes.start("libero", sim_bridge={**SMALL, "step_limit": 400})
    ros.wait(lambda: monitor.stepped() >= 3, 60)
    # Lockstep: paused, the bridge still executes the command on its way, then nothing until it is resumed.
    assert ros.call(SetBool, "/sim_bridge/pause", SetBool.Request(data=True)).message == "paused"
    diagnostics = ros.listen(DiagnosticArray, "/diagnostics")
    ros.wait(lambda: any(m.status[0].message == "paused" for m in diagnostics))
    before = monitor.stepped()
    diagnostics.clear()
    ros.wait(lambda: sum(m.status[0].message == "paused" for m in diagnostics) >= 2)
    assert monitor.stepped() <= before
    assert ros.call(SetBool, "/sim_bridge/pause", SetBool.Request(data=False)).message == "running"
    ros.wait(lambda: monitor.stepped() > before)


def test_outcome_is_latched_with_the_versions_that_made_it(ros, nodes, monitor):
    nodes.start("libero", sim_bridge={**SMALL, "step_limit": 3})
    assert outcome_of(ros, monitor).outcome == "failure"
    late = ros.listen(DiagnosticArray, OUTCOME_TOPIC, LATCHED)
    ros.wait(lambda: late)
    facts = values_of(late[0].status[0])
    assert facts["mujoco"] == "3.3.2"
    assert {"robosuite", "libero", "renderer", "stepper", "steps", "suite", "task", "init_state"} <= set(facts)


def test_hold_policy_opens_the_gripper_and_does_not_move():
    step = HoldPolicy().act(None)
    assert step.action.tolist() == [0, 0, 0, 0, 0, 0, -1]
