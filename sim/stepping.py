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
    """The same step, bit for bit, in less than half the time.

    robosuite computes a whole forward pass three times a substep: twice before the controller and once inside
    `mj_step`. Positions, velocities and contacts come out the same each time, so they are computed once here. The
    three constraint solves are kept, because each starts from the result of the one before and ends in other bits.
    The controller's arithmetic calls robosuite's own compiled functions on arrays of the same memory layout, in the
    same order; what is left out is what nothing here reads (sensors, observables, moving averages).
    """

    name = "fast"

    def __init__(self, world: World) -> None:
        import mujoco
        from robosuite.utils import control_utils

        self._world, self._mujoco, self._osc = world, mujoco, control_utils
        domain, model = world.domain, world.model
        robot = domain.robots[0]
        self._substeps = int(domain.control_timestep / domain.model_timestep)
        self._arm_actuators = np.array(robot._ref_joint_actuator_indexes)
        self._finger_actuators = np.array(robot._ref_joint_gripper_actuator_indexes)
        self._torque_low, self._torque_high = robot.torque_limits
        limits = model.actuator_ctrlrange[self._finger_actuators]
        self._finger_bias = 0.5 * (limits[:, 1] + limits[:, 0])
        self._finger_weight = 0.5 * (limits[:, 1] - limits[:, 0])
        self._mass = np.zeros((model.nv, model.nv))
        self._jacobian_pos = np.zeros((3, model.nv))
        self._jacobian_ori = np.zeros((3, model.nv))

    def step(self, action: np.ndarray) -> bool:
        """action: (7,) float64.  Returns whether the goal holds after the step."""
        mujoco, world = self._mujoco, self._world
        model, data, domain, clock = world.model, world.data, world.domain, world.clock
        robot = domain.robots[0]
        controller, gripper = robot.controller, robot.gripper
        arm, fingers = action[:6], action[6:]
        cache: dict[str, Any] = {}
        for substep in range(self._substeps):
            mujoco.mj_forwardSkip(model, data, mujoco.mjtStage.mjSTAGE_NONE, 1)
            if substep == 0:
                # The goal is set here, and robosuite decides whether it looks at the arm once more first.
                controller.set_goal(arm)
                torques = controller.run_controller()
                goal = np.array(controller.goal_pos), np.array(controller.goal_ori)
            else:
                mujoco.mj_fwdConstraint(model, data)
                torques = self._torques(controller, *goal)
            data.ctrl[self._finger_actuators] = self._finger_bias + self._finger_weight * gripper.format_action(fingers)
            data.ctrl[self._arm_actuators] = np.clip(torques, self._torque_low, self._torque_high)
            mujoco.mj_step2(model, data)
            clock.update(timestep=domain.model_timestep, obs_cache=cache)
        domain.timestep += 1
        domain.cur_time += domain.control_timestep
        # robosuite evaluates the goal on both sides of its housekeeping, and a goal like "turnon" acts on the scene.
        world.success()
        domain._post_process()
        return world.success()

    def _torques(self, controller: Any, goal_pos: np.ndarray, goal_ori: np.ndarray) -> np.ndarray:
        """`OperationalSpaceController.run_controller` of robosuite 1.4: (7,) N m, before clipping.

        Khatib, "A unified approach for motion and force control of robot manipulators", 1987, with position and
        orientation decoupled and a posture task in the null space.
        """
        mujoco, osc, data, model = self._mujoco, self._osc, self._world.data, self._world.model
        dofs = controller.qvel_index
        site = self._world.domain.robots[0].eef_site_id
        mujoco.mj_jacSite(model, data, self._jacobian_pos, self._jacobian_ori, site)
        mujoco.mj_fullM(model, self._mass, data.qM)
        qvel = data.qvel
        ee_pos, ee_ori = np.array(data.site_xpos[site]), np.array(data.site_xmat[site].reshape(3, 3))
        pos_vel, ori_vel = np.dot(self._jacobian_pos, qvel), np.dot(self._jacobian_ori, qvel)
        joint_pos, joint_vel = data.qpos[controller.qpos_index], qvel[dofs]
        # Indexing leaves these in column order, as robosuite's are, and the matrix products round accordingly.
        jac_pos, jac_ori = self._jacobian_pos[:, dofs], self._jacobian_ori[:, dofs]
        jac = np.array(np.vstack([jac_pos, jac_ori]))
        mass = self._mass[dofs, :][:, dofs]

        kp, kd = controller.kp, controller.kd
        force = np.multiply(goal_pos - ee_pos, kp[0:3]) + np.multiply(-pos_vel, kd[0:3])
        torque = np.multiply(osc.orientation_error(goal_ori, ee_ori), kp[3:6]) + np.multiply(-ori_vel, kd[3:6])
        _, lambda_pos, lambda_ori, nullspace = osc.opspace_matrices(mass, jac, jac_pos, jac_ori)
        wrench = np.concatenate([np.dot(lambda_pos, force), np.dot(lambda_ori, torque)])
        torques = np.dot(jac.T, wrench) + data.qfrc_bias[dofs]
        torques += osc.nullspace_torques(mass, nullspace, controller.initial_joint, joint_pos, joint_vel)
        return torques


STEPPERS = {"official": OfficialStepper, "fast": FastStepper}


def check_stepper(name: str) -> None:
    """Raises ConfigurationError unless `name` is a stepper."""
    if name not in STEPPERS:
        raise ConfigurationError(f"no stepper is called {name!r}; choose one of: {', '.join(STEPPERS)}")
