"""How one control step is simulated: 25 substeps of 2 ms under robosuite's operational-space controller."""

from __future__ import annotations

from typing import Any

import numpy as np

from sim.errors import ConfigurationError
from sim.world import World


class OfficialStepper:
    """robosuite's own `step`."""

    name = "official"

    def __init__(self, world: World) -> None:
        self._world = world

    def step(self, action: np.ndarray) -> bool:
        """action: (7,) float64.  Returns whether the goal holds after the step."""
        _, _, done, _ = self._world.domain.step(action)
        return bool(done)


class FastStepper:
    """The same step, bit for bit, in about half the time.

    robosuite computes a whole forward pass three times a substep: twice before the controller and once inside
    `mj_step`. Positions, velocities and contacts come out the same each time, so they are computed once here. The
    three constraint solves are kept, because each starts from the result of the one before and ends in other bits.
    The controller's arithmetic calls robosuite's own compiled functions on arrays of the same memory layout, in the
    same order; what is left out is what nothing here reads (sensors, observables, moving averages).
    """

    name = "fast"

    def __init__(self, world: World) -> None:
        import mujoco

        from sim import osc

        self._world, self._mujoco, self._osc = world, mujoco, osc
        domain, model = world.domain, world.model
        robot = domain.robots[0]
        self._substeps = int(domain.control_timestep / domain.model_timestep)
        self._site = robot.eef_site_id
        self._qposadr = np.array(robot._ref_joint_pos_indexes, np.int64)
        self._dofs = np.array(robot._ref_joint_vel_indexes, np.int64)
        self._arm = np.array(robot._ref_joint_actuator_indexes, np.int64)
        self._fingers = np.array(robot._ref_joint_gripper_actuator_indexes, np.int64)
        self._torque_low, self._torque_high = (np.ascontiguousarray(limit) for limit in robot.torque_limits)
        limits = model.actuator_ctrlrange[self._fingers]
        self._finger_bias = 0.5 * (limits[:, 1] + limits[:, 0])
        self._finger_weight = 0.5 * (limits[:, 1] - limits[:, 0])
        self._mass = np.zeros((model.nv, model.nv))
        self._jac_pos, self._jac_ori = np.zeros((3, model.nv)), np.zeros((3, model.nv))

    def step(self, action: np.ndarray) -> bool:
        """action: (7,) float64.  Returns whether the goal holds after the step."""
        mujoco, world, osc = self._mujoco, self._world, self._osc
        model, data, domain, clock = world.model, world.data, world.domain, world.clock
        robot, timestep = domain.robots[0], domain.model_timestep
        controller, gripper = robot.controller, robot.gripper
        before = gripper.current_action
        change = np.array([-1.0, 1.0]) * gripper.speed * np.sign(action[6:])
        fingers = np.array(np.broadcast_to(before, 2), np.float64)
        cache: dict[str, Any] = {}
        for substep in range(self._substeps):
            mujoco.mj_forwardSkip(model, data, mujoco.mjtStage.mjSTAGE_NONE, 1)
            if substep == 0:
                # robosuite sets its goal here, and decides whether it looks at the arm once more first.
                controller.set_goal(action[:6])
                torques = np.clip(controller.run_controller(), self._torque_low, self._torque_high)
                data.ctrl[self._arm] = torques
                goal_pos, goal_ori = np.array(controller.goal_pos), np.array(controller.goal_ori)
            else:
                mujoco.mj_fwdConstraint(model, data)
                self._control_arm(controller, goal_pos, goal_ori)
            osc.move_fingers(fingers, change, self._finger_bias, self._finger_weight, self._fingers, data.ctrl)
            mujoco.mj_step2(model, data)
            clock.update(timestep=timestep, obs_cache=cache)
        gripper.current_action = fingers
        domain.timestep += 1
        domain.cur_time += domain.control_timestep
        # robosuite evaluates the goal on both sides of its housekeeping, and a goal like "turnon" acts on the scene.
        world.success()
        domain._post_process()
        return world.success()

    def _control_arm(self, controller: Any, goal_pos: np.ndarray, goal_ori: np.ndarray) -> None:
        """`OperationalSpaceController.run_controller` of robosuite 1.4, from the state to the arm's motors.

        Khatib, "A unified approach for motion and force control of robot manipulators", 1987, with position and
        orientation decoupled and a posture task in the null space.
        """
        data, model, osc = self._world.data, self._world.model, self._osc
        self._mujoco.mj_jacSite(model, data, self._jac_pos, self._jac_ori, self._site)
        self._mujoco.mj_fullM(model, self._mass, data.qM)
        qvel = data.qvel
        lambda_pos, lambda_ori, force, torque, jac, mass, nullspace = osc.decouple(
            self._jac_pos,
            self._jac_ori,
            self._mass,
            self._dofs,
            data.site_xpos[self._site],
            data.site_xmat[self._site].reshape(3, 3),
            np.dot(self._jac_pos, qvel),
            np.dot(self._jac_ori, qvel),
            goal_pos,
            goal_ori,
            controller.kp,
            controller.kd,
        )
        wrench = np.concatenate([np.dot(lambda_pos, force), np.dot(lambda_ori, torque)])
        osc.command(
            np.dot(jac.T, wrench),
            mass,
            nullspace,
            controller.initial_joint,
            data.qpos,
            qvel,
            data.qfrc_bias,
            self._qposadr,
            self._dofs,
            self._torque_low,
            self._torque_high,
            self._arm,
            data.ctrl,
        )


STEPPERS: dict[str, type[OfficialStepper] | type[FastStepper]] = {"official": OfficialStepper, "fast": FastStepper}


def check_stepper(name: str) -> None:
    """Raises ConfigurationError unless `name` is a stepper."""
    if name not in STEPPERS:
        raise ConfigurationError(f"no stepper is called {name!r}; choose one of: {', '.join(STEPPERS)}")
