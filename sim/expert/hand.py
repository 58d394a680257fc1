"""The robot as the experts see it: where its hand is, what it holds, and the actions that its arm can follow."""

from __future__ import annotations

import mujoco
import numpy as np

from mllm.policy import ActionSpec
from sim.env import LiberoEnv
from sim.expert.geometry import geoms_of, rotation_about
from sim.expert.servo import UP, servo, top_down, turn_between

# Our choice, from the Panda's kinematics (https://frankaemika.github.io/docs/control_parameters.html). Joints count
# from 0 here. With joint 5 at pi the axes of the wrist line up, and with joint 3 at -0.47 rad the arm is straight.
WRIST, WRIST_FREE, LEAN_GAIN, MAX_LEAN = 5, 2.75, 1.0, 0.4
FLANGE, FLANGE_RANGE = 6, 2.7
ELBOW, ELBOW_STRAIGHT, ELBOW_BENT = 3, -0.5, -0.8
OUTWARD = 0.1  # m
HALF_ROUND = 1.9  # rad: a hand that would have to turn farther grips the other way round


class Hand:
    """The Panda's hand, on a copy of the simulator's state.

    Kinematics and contacts are worked out on the copy, so that they follow from the state alone, and the live
    simulation, whose solver starts from its last result, takes the same course with and without an expert watching.

    model: mujoco.MjModel, live.  data: mujoco.MjData, the copy.  geoms: (ngeom,) bool, the robot's.
    base: (3,) m, where the robot stands.
    """

    def __init__(self, env: LiberoEnv, spec: ActionSpec) -> None:
        world = env.privileged()
        model, robot = world.model, world.domain.robots[0]
        self.model, self.data = model, mujoco.MjData(model)
        self._env, self._spec = env, spec
        roots = [model.body(part.root_body).id for part in (robot.robot_model, robot.robot_model.mount)]
        self.geoms = geoms_of(model, roots[0]) | geoms_of(model, roots[1])
        self._fingers = [geoms_of(model, model.body(f"gripper0_{side}finger").id) for side in ("left", "right")]
        self._finger_dofs = np.array(robot._ref_gripper_joint_vel_indexes)
        self._finger_joints = np.array(robot._ref_gripper_joint_pos_indexes)
        self._joints = np.array(robot._ref_joint_pos_indexes)
        self._site = robot.eef_site_id
        self._root = roots[0]

    def look(self) -> None:
        """Takes over the simulator's state now."""
        live = self._env.privileged().data
        self.data.qpos[:], self.data.qvel[:] = live.qpos, live.qvel
        mujoco.mj_fwdPosition(self.model, self.data)

    @property
    def base(self) -> np.ndarray:
        return self.data.xpos[self._root]

    @property
    def position(self) -> np.ndarray:
        """(3,) m, the grip site."""
        return self.data.site_xpos[self._site]

    @property
    def axes(self) -> np.ndarray:
        """(3, 3), the grip site's axes in columns; see `sim.expert.servo.grip_axes`."""
        return self.data.site_xmat[self._site].reshape(3, 3)

    @property
    def finger_speed(self) -> float:
        """m/s, of the faster finger."""
        return float(np.abs(self.data.qvel[self._finger_dofs]).max())

    @property
    def opening(self) -> float:
        """m, between the fingers."""
        return float(np.abs(self.data.qpos[self._finger_joints]).sum())

    def touching(self, geoms: np.ndarray) -> int:
        """How many fingers touch one of the geoms, (ngeom,) bool."""
        pairs = self.data.contact.geom
        return sum(bool((geoms[pairs] & finger[pairs[:, ::-1]]).any()) for finger in self._fingers)

    def holds(self, geoms: np.ndarray) -> bool:
        """Whether both fingers touch one of the geoms, (ngeom,) bool."""
        return self.touching(geoms) == len(self._fingers)

    def upright(self, yaw: float) -> np.ndarray:
        """(3, 3) axes of a grip site that points down, turned by `yaw`, rad.

        Close to the robot, where the wrist would be straight and the controller loses its way, the fingertips lean
        towards the robot, by no more than `MAX_LEAN`.
        """
        lean = min(LEAN_GAIN * max(float(self.data.qpos[self._joints[WRIST]]) - WRIST_FREE, 0.0), MAX_LEAN)
        return rotation_about(np.cross(UP, self._outward()), lean) @ top_down(yaw)

    def turn_to(self, axes: np.ndarray) -> np.ndarray:
        """(3,) rad: how to turn to a grip with the (3, 3) `axes`, or to the same grip half round, which is nearer or
        within what the last joint allows.
        """
        angle, forward = float(self.data.qpos[self._joints[FLANGE]]), self.axes[:, 2]
        turn, other = (turn_between(self.axes, side) for side in (axes, axes * [-1.0, -1.0, 1.0]))

        def possible(turn: np.ndarray) -> bool:
            return bool(np.linalg.norm(turn) < HALF_ROUND and abs(angle + turn @ forward) < FLANGE_RANGE)

        return other if possible(other) and not possible(turn) else turn

    def _outward(self) -> np.ndarray:
        """(3,) horizontal unit vector from the robot to its hand."""
        outward = (self.position - self.base) * [1.0, 1.0, 0.0]
        return outward / max(float(np.linalg.norm(outward)), 1e-6)

    def action(self, offset: np.ndarray, turn: np.ndarray, close: bool) -> np.ndarray:
        """(7,) float32, see `sim.expert.servo.servo`.

        An arm that is nearly straight comes in whatever else it does; and one pushed beyond that, which bends the wrong
        way when it is pulled back, goes out first.
        """
        elbow = float(self.data.qpos[self._joints[ELBOW]])
        if elbow > ELBOW_STRAIGHT:
            offset = OUTWARD * self._outward()
        else:
            stretched = np.clip((elbow - ELBOW_BENT) / (ELBOW_STRAIGHT - ELBOW_BENT), 0.0, 1.0)
            offset = offset - stretched * OUTWARD * self._outward()
        return servo(offset, turn, close, self._spec)
