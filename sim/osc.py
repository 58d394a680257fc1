"""The compiled half of `sim.stepping.FastStepper`: robosuite's operational-space control between its BLAS calls.

Importing this module imports robosuite. Matrices are built in column order because robosuite's are: its compiled
functions are specialised by memory layout, and another layout multiplies in another order and rounds differently.
The three products that robosuite leaves to numpy stay with numpy, whose BLAS is not the one compiled code calls.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error


@njit(cache=True)
def decouple(jac_pos_all, jac_ori_all, mass_all, dofs, ee_pos, ee_ori, pos_vel, ori_vel, goal_pos, goal_ori, kp, kd):
    """Everything before the wrench.

    jac_pos_all, jac_ori_all: (3, nv) of the grip site.  mass_all: (nv, nv).  dofs: (7,) the arm's.
    ee_pos: (3,) m.  ee_ori: (3, 3) or (9,).  pos_vel, ori_vel: (3,) m/s, rad/s.  goal_pos, goal_ori: as ee.
    kp, kd: (6,).
    Returns lambda_pos, lambda_ori (3, 3), force (3,) m/s^2, torque (3,) rad/s^2, jacobian (6, 7), mass (7, 7) and the
    null-space projector (7, 7).
    """
    n = len(dofs)
    jac_pos, jac_ori, jac = np.empty((n, 3)).T, np.empty((n, 3)).T, np.empty((n, 6)).T
    mass = np.empty((n, n)).T
    for j in range(n):
        for i in range(3):
            jac_pos[i, j] = jac[i, j] = jac_pos_all[i, dofs[j]]
            jac_ori[i, j] = jac[i + 3, j] = jac_ori_all[i, dofs[j]]
        for i in range(n):
            mass[i, j] = mass_all[dofs[i], dofs[j]]
    force = np.empty(3)
    torque = np.empty(3)
    error = orientation_error(goal_ori, ee_ori)
    for i in range(3):
        force[i] = (goal_pos[i] - ee_pos[i]) * kp[i] + (-pos_vel[i]) * kd[i]
        torque[i] = error[i] * kp[i + 3] + (-ori_vel[i]) * kd[i + 3]
    _, lambda_pos, lambda_ori, nullspace = opspace_matrices(mass, jac, jac_pos, jac_ori)
    return lambda_pos, lambda_ori, force, torque, jac, mass, nullspace


@njit(cache=True)
def command(task, mass, nullspace, rest, qpos, qvel, bias, qposadr, dofs, low, high, arm, ctrl):
    """Adds gravity compensation and the posture task to `task` (7,) N m, clips, and writes `ctrl` at `arm`.

    rest: (7,) rad, the posture.  qpos, qvel, bias: the whole scene's.  qposadr, dofs: (7,) the arm's.
    low, high: (7,) N m.
    """
    n = len(dofs)
    joint_pos, joint_vel = np.empty(n), np.empty(n)
    for j in range(n):
        joint_pos[j], joint_vel[j] = qpos[qposadr[j]], qvel[dofs[j]]
    posture = nullspace_torques(mass, nullspace, rest, joint_pos, joint_vel)
    for j in range(n):
        value = (task[j] + bias[dofs[j]]) + posture[j]
        ctrl[arm[j]] = low[j] if value < low[j] else (high[j] if value > high[j] else value)


@njit(cache=True)
def move_fingers(current, change, bias, weight, fingers, ctrl):
    """Moves the gripper's command `current` (2,) by `change`, within [-1, 1], and writes `ctrl` at `fingers`."""
    for j in range(len(fingers)):
        current[j] = min(max(current[j] + change[j], -1.0), 1.0)
        ctrl[fingers[j]] = bias[j] + weight[j] * current[j]
