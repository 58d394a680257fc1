"""A LIBERO episode as a robot: publishes what a robot's drivers would, and executes the gated command.

One thread does everything, so a step is a step: nothing of ROS runs while the simulator does.
lockstep: the simulator waits for the command that answers each observation, matched by stamp.
realtime: it steps at the control frequency whatever the policy does.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.duration import Duration
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, Image, JointState
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from flashvla_ros.diagnostics import ERROR, OK, STALE, WARN, Diagnostics, Report, Window, describe, status, status_array
from flashvla_ros.errors import ConfigurationError, MessageError
from flashvla_ros.messages import (
    camera_info_message,
    image_message,
    pose_message,
    read_gripper,
    read_twist,
    stamp_ns,
    to_stamp,
    twist_to_action,
)
from flashvla_ros.pairing import Pairing
from flashvla_ros.parameters import NodeParameters
from flashvla_ros.qos import LATCHED, parse_qos
from flashvla_ros.runner import StopRequested, run_node
from flashvla_ros.sim_bridge_parameters import BridgeParameters
from flashvla_ros.traces import Trace
from mllm.policy import ActionSpec
from sim.env import LiberoEnv
from sim.errors import ConfigurationError as SimConfigurationError

NO_MOTION = np.zeros(6, np.float32)
DISCOVERY_LIMIT = 30.0  # s that the first observation waits for somebody to receive it


class SimBridgeNode(Node):
    """Owns one LIBERO environment and the simulated clock, which never goes back, not even at a reset."""

    def __init__(self) -> None:
        super().__init__("sim_bridge", automatically_declare_parameters_from_overrides=True)
        self._params = NodeParameters(self, BridgeParameters)
        p = self._params.value
        self._spec = ActionSpec()
        self._period_ns = round(1e9 / self._spec.control_freq)
        self._now_ns = 1_000_000_000  # stamp 0 means "no time" in ROS
        self._pairing = Pairing()
        self._answered_ns = 0  # stamp of the newest complete command
        self._action = np.append(NO_MOTION, np.float32(-1))
        self._fresh = False
        self._reset_wanted, self._paused = p.autostart, False
        self._troubles: dict[str, str] = {}  # node -> what it complains about on /diagnostics
        self._episode: Trace | None = None
        self._outcome = "no episode yet"
        self._physics, self._render, self._answer, self._overruns = Window(), Window(), Window(), 0
        self._env: LiberoEnv | None = None

        image_qos, state_qos = parse_qos(p.image_qos, "image_qos"), parse_qos(p.state_qos, "state_qos")
        command_qos = parse_qos(p.command_qos, "command_qos")
        self._clock_publisher = self.create_publisher(Clock, "/clock", 10)
        self._cameras = {}
        for entry in p.cameras:
            camera, _, prefix = entry.partition("=")
            self._cameras[camera] = (
                self.create_publisher(Image, f"{prefix}/image_raw", image_qos),
                self.create_publisher(CameraInfo, f"{prefix}/camera_info", image_qos),
            )
        self._poses = self.create_publisher(PoseStamped, "eef_pose", state_qos)
        self._joints = self.create_publisher(JointState, "joint_states", state_qos)
        self._instructions = self.create_publisher(String, "instruction", LATCHED)
        self._outcomes = self.create_publisher(DiagnosticArray, "~/outcome", LATCHED)
        self._steps = self.create_publisher(DiagnosticArray, "~/step", state_qos)
        self.create_subscription(TwistStamped, p.twist_topic, self._on_twist, command_qos)
        self.create_subscription(JointState, p.gripper_topic, self._on_gripper, command_qos)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self.create_service(Trigger, "~/reset", self._on_reset)
        self.create_service(SetBool, "~/pause", self._on_pause)
        self._before_episode: list[Any] = [self.create_client(Trigger, service) for service in p.before_episode]
        self._diagnostics = Diagnostics(self, self._report)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self)

    # ------------------------------------------------------------------ messages in

    def _on_twist(self, message: TwistStamped) -> None:
        self._half(stamp_ns(message.header.stamp), "twist", read_twist(message))

    def _on_gripper(self, message: JointState) -> None:
        try:
            self._half(stamp_ns(message.header.stamp), "gripper", read_gripper(message))
        except MessageError as error:
            self.get_logger().warning(str(error))

    def _half(self, stamp: int, kind: str, value: Any) -> None:
        command = self._pairing.add(stamp, kind, value)
        self._pairing.abandoned()
        if command is not None:
            linear, angular = command["twist"]
            action = twist_to_action(linear, angular, command["gripper"], self._spec, self._params.value.max_opening)
            self._action, self._answered_ns, self._fresh = np.clip(action, -1, 1), stamp, True
        elif self._params.value.mode == "realtime" and kind == "twist" and not np.any(value):
            # A twist of zero without a gripper half is the gate's stop: stand still, leave the gripper.
            self._action, self._fresh = np.append(NO_MOTION, self._action[6]), True

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for entry in message.status:
            if entry.level == OK or entry.name == self.get_name():
                self._troubles.pop(entry.name, None)
            else:
                self._troubles[entry.name] = entry.message

    def _on_reset(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._reset_wanted = True
        response.success, response.message = True, "the episode starts; see ~/outcome for how it ends"
        return response

    def _on_pause(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self._paused = request.data
        response.success, response.message = True, "paused" if request.data else "running"
        return response

    # ------------------------------------------------------------------ the main loop

    def run(self, stop: StopRequested) -> None:
        """Serves episodes until a signal comes."""
        while not stop:
            if not self._reset_wanted:
                self._executor.spin_once(timeout_sec=0.1)
                continue
            self._reset_wanted = False
            try:
                self._run_episode(stop)
            except (ConfigurationError, SimConfigurationError) as error:
                self._finish("error", str(error))
                if self._env is None:  # the very first episode: the parameters given at start are wrong
                    raise ConfigurationError(str(error)) from error
            except Exception as error:
                self._finish("error", describe(error))

    def _run_episode(self, stop: StopRequested) -> None:
        p = self._params.value
        env = self._environment(p)
        config, start = p.env_config(), {"init_state": p.initial_state()}
        self._episode = Trace(config, config.episode_task(options=start), p.initial_state(), p.mode)
        self._outcome = "running"
        observation, info = env.reset(seed=p.seed, options=start)
        self._episode.begin(env.state())
        self._now_ns += 1_000_000_000  # no stamp of the last episode is mistaken for one of this
        self._announce(env.task.language, stop)
        self._pairing, self._answered_ns = Pairing(), 0
        self._action, self._fresh = np.append(NO_MOTION, np.float32(-1)), False
        self.get_logger().info(
            f"episode: {p.suite} task {env.task.index} '{env.task.language}', "
            f"initial state {p.initial_state()}, {p.mode}"
        )
        deadline = time.monotonic()
        while not stop and not self._reset_wanted:
            published = time.perf_counter()
            self._publish(env, observation)
            if p.mode == "lockstep":
                if not self._await_command(p.lockstep_timeout, stop):
                    if not stop and not self._reset_wanted:
                        troubles = "; ".join(f"{node}: {what}" for node, what in self._troubles.items())
                        self._finish(
                            "error",
                            f"no command answered the observation of {self._now_ns * 1e-9:.3f} s within "
                            f"{p.lockstep_timeout} s; {troubles or 'no node reports a fault'}",
                        )
                    return
            else:
                deadline = self._wait_until(deadline + self._period_ns * 1e-9, stop)
                if not self._fresh and p.on_silence == "zero":
                    self._action = np.append(NO_MOTION, self._action[6])
            answered = time.perf_counter() - published
            while self._paused and not stop and not self._reset_wanted:
                self._executor.spin_once(timeout_sec=0.1)
            action, self._fresh = self._action, False
            observation, _reward, terminated, truncated, info = env.step(action)
            timing = {"answer": answered, **info["timing"]}
            self._episode.add(action, env.state(), timing)
            self._note_timing(timing)
            self._now_ns += self._period_ns
            if terminated or truncated:
                self._publish(env, observation)
                self._finish("success" if terminated else "failure")
                return

    def _environment(self, p: BridgeParameters) -> LiberoEnv:
        config = p.env_config()
        if self._env is None or config != self._env.config:
            if self._env is not None:
                self._env.close()
                self._env = None
            self._env = LiberoEnv(config)
        return self._env

    def _announce(self, instruction: str, stop: StopRequested) -> None:
        """The policy hears the instruction and forgets the last episode before it sees the first observation."""
        self._instructions.publish(String(data=instruction))
        limit = time.monotonic() + DISCOVERY_LIMIT
        while self._params.value.mode == "lockstep" and not stop and not self._connected():
            self._executor.spin_once(timeout_sec=0.05)
            if time.monotonic() > limit:
                raise ConfigurationError(
                    f"after {DISCOVERY_LIMIT} s fewer than {self._params.value.receivers} nodes receive eef_pose and "
                    "/clock, or none the cameras: is the policy active, the gate running, use_sim_time true in both?"
                )
        # Before the first command can come, or it would seem to be from the future.
        self._clock_publisher.publish(Clock(clock=to_stamp(self._now_ns)))
        for client in self._before_episode:
            reason = "it is not there"
            while not stop and reason:
                if client.service_is_ready():
                    reason = self._ask(client)
                self._executor.spin_once(timeout_sec=0.05)
                if time.monotonic() > limit:
                    raise ConfigurationError(
                        f"service '{client.srv_name}' did not succeed within {DISCOVERY_LIMIT} s: {reason}; start its "
                        "node, or take it out of parameter 'before_episode'"
                    )

    def _ask(self, client: Any) -> str:
        """Calls a Trigger service. Returns why it did not succeed, empty when it did.

        A server may answer before it has found the client, and its answer is lost: it is asked again, and any answer
        counts.
        """
        asked: list[Any] = []
        for _ in range(3):
            end = time.monotonic() + DISCOVERY_LIMIT / 3
            asked.append(client.call_async(Trigger.Request()))
            while not any(future.done() for future in asked) and time.monotonic() < end:
                self._executor.spin_once(timeout_sec=0.05)
            if answer := next((future.result() for future in asked if future.done()), None):
                break
        for future in asked:
            client.remove_pending_request(future)
        if answer is None:
            return "it does not answer"
        return "" if answer.success else answer.message or "it did not say why"

    def _connected(self) -> bool:
        """Everybody receives: what is published from now on is delivered."""
        receivers = self._params.value.receivers
        return all(p.get_subscription_count() >= receivers for p in (self._poses, self._clock_publisher)) and all(
            images.get_subscription_count() >= receivers - 1 for images, _ in self._cameras.values()
        )

    def _await_command(self, limit: float, stop: StopRequested) -> bool:
        end = time.monotonic() + limit
        while not stop and not self._reset_wanted:
            if self._answered_ns == self._now_ns:
                return True
            left = end - time.monotonic()
            if left <= 0:
                return False
            self._executor.spin_once(timeout_sec=min(max(left, 0.01), 0.1))
        return False

    def _wait_until(self, deadline: float, stop: StopRequested) -> float:
        """Serves callbacks until `deadline` (monotonic, s). Returns it, or now when it was missed."""
        if time.monotonic() > deadline:
            self._overruns += 1
            self._executor.spin_once(timeout_sec=0)
            return time.monotonic()
        while not stop and not self._reset_wanted and time.monotonic() < deadline:
            self._executor.spin_once(timeout_sec=max(0.001, min(0.1, deadline - time.monotonic())))
        return deadline

    # ------------------------------------------------------------------ messages out

    def _publish(self, env: LiberoEnv, observation: dict[str, Any]) -> None:
        """Largest first, and what the policy does not wait for last."""
        stamp = to_stamp(self._now_ns)
        proprio, size = observation["proprio"], self._params.value.image_size
        for camera, (images, _) in self._cameras.items():
            images.publish(image_message(observation["images"][camera], stamp, camera))
        self._poses.publish(pose_message(proprio["eef_pos"], proprio["eef_quat"], stamp, self._spec.frame))
        joints = JointState(
            name=[*(f"panda_joint{i}" for i in range(1, 8)), "panda_finger_joint1", "panda_finger_joint2"],
            position=[*proprio["joint_pos"].tolist(), *proprio["gripper_qpos"].tolist()],
            velocity=[*proprio["joint_vel"].tolist(), math.nan, math.nan],
        )
        joints.header.stamp = stamp
        self._joints.publish(joints)
        self._clock_publisher.publish(Clock(clock=stamp))
        for camera, (_, infos) in self._cameras.items():
            infos.publish(camera_info_message(env.camera_info(camera), size, size, stamp, camera))

    def _note_timing(self, timing: dict[str, float]) -> None:
        self._physics.add(timing["physics"])
        self._render.add(timing["render"])
        self._answer.add(timing["answer"])
        values = {f"{name}_ms": f"{seconds * 1e3:.3f}" for name, seconds in timing.items()}
        self._steps.publish(status_array(to_stamp(self._now_ns), status(self.get_name(), OK, "stepped", values)))

    def _finish(self, outcome: str, error: str = "") -> None:
        """Publishes how the episode ended, and writes its trace. Errors are never failures."""
        p, episode = self._params.value, self._episode
        level = {"success": OK, "failure": WARN, "error": ERROR}[outcome]
        values = {"suite": p.suite, "task": p.task, "init_state": p.init_state, "mode": p.mode, "error": error}
        if self._env is not None:
            values |= {"instruction": self._env.task.language, **self._env.provenance()}
        if episode is not None:
            values["steps"] = str(len(episode.actions))
            if p.trace_file:
                episode.save(Path(p.trace_file), outcome, error)
        self._outcome = outcome
        self._outcomes.publish(status_array(to_stamp(self._now_ns), status(self.get_name(), level, outcome, values)))
        self._diagnostics.publish()
        line = f"{outcome} after {values.get('steps', 0)} steps {error}".rstrip()
        if outcome == "error":
            self.get_logger().error(line)
        else:
            self.get_logger().info(line)

    def _report(self) -> Report:
        values = {
            "outcome": self._outcome,
            "mode": self._params.value.mode,
            "overruns": self._overruns,
            **self._physics.summary("physics"),
            **self._render.summary("render"),
            **self._answer.summary("answer"),
        }
        if self._paused:
            return STALE, "paused", values
        if self._outcome == "error":
            return ERROR, "the last episode ended in an error", values
        if self._overruns and self._params.value.mode == "realtime":
            return WARN, f"{self._overruns} steps took longer than the control period", values
        return OK, self._outcome, values

    def close(self) -> None:
        self._outcomes.wait_for_all_acked(Duration(seconds=1))
        if self._env is not None:
            self._env.close()


def main() -> int:
    return run_node(SimBridgeNode, lambda node, stop: node.run(stop))


if __name__ == "__main__":
    sys.exit(main())
