"""Pick an object up and put it down, as a function of the simulator's state alone.

A plan is made once an episode: where to hold the object, and how high to travel. After that no step remembers the one
before: the action follows from positions, velocities and contacts now. So the expert can say what to do in a state
that another policy got into (DAgger, Ross et al. 2011), and one frame is enough to learn its answer from.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

from mllm.policy import ActionSpec, ActionStep, Observation
from sim.env import LiberoEnv
from sim.errors import ConfigurationError
from sim.expert.geometry import body_points, corridor, geoms_of, heading, heights, rotation_about_z
from sim.expert.grasp import FINGERTIP, PALM, PALM_HALF_LENGTH, Scene, find_grasp
from sim.expert.servo import servo, turn_to

# All of these are our choice. Lengths in metres.
CLEARANCE = 0.03  # over everything on the way
FUNNEL_SLOPE = 3.0  # rise over run of the way down to a goal
FUNNEL_MOUTH = 0.008  # horizontal distance from which on it rises
TURN_LEVER = 0.04  # a wrist that is 1 rad off counts as this distance from the goal
GRASP_NEAR, GRASP_LEVEL = 0.010, 0.010  # horizontal and vertical distance at which the fingers close
PLACE_NEAR, PLACE_LEVEL = 0.015, 0.010  # the same for letting go
PLACE_GAP = 0.004  # over the resting height, where a carried object is steered to
STILL = 0.02  # m/s: fingers that move slower have a firm hold
RETREAT = 0.08


@dataclass(frozen=True)
class Plan:
    """What one episode keeps. Positions are in the world frame.

    offset: (3,) m from the object's origin to the grip site, for an object turned as in `rotation`, (3, 3).
    yaw: rad, the gripper's turn about z with it.
    points: (n, 3) m, the object's hull in its own frame.
    hover, carry: m, heights of the grip site on the way to the object, and of the object's origin on the way back.
    rest: m, height of the object's lowest point at the target, from the target's origin.
    """

    offset: np.ndarray
    rotation: np.ndarray
    yaw: float
    points: np.ndarray
    hover: float
    carry: float
    rest: float


def funnel(position: np.ndarray, goal: np.ndarray, ceiling: float, astray: float = 0.0) -> np.ndarray:
    """(3,) m: where to steer `position` next, so that it comes down on `goal` from above and hits nothing beside it.

    Far away that is over the goal at height `ceiling`; within the funnel it sinks with the distance; and from below
    the funnel's wall it rises first, and moves across in proportion as it gets there.
    astray: m, added to the distance while something else than the position is not right yet.
    """
    across = goal[:2] - position[:2]
    away = float(np.hypot(np.linalg.norm(across), astray))
    height = goal[2] + min(FUNNEL_SLOPE * max(away - FUNNEL_MOUTH, 0.0), max(ceiling - goal[2], 0.0))
    freedom = np.clip((position[2] - height) / 0.04 + 1.5, 0.0, 1.0)  # 1 from 2 cm below the wall on, 0 from 6 cm
    return np.array([*(position[:2] + freedom * across), height])


class PickPlaceExpert:
    """Carries `item` to `target` with privileged access to `env`; a policy that ignores what it observes.

    item: a movable object's name.  target: an object's or a region's name.
    phase: what it is doing; "approach", "descend", "close", "lift", "carry", "lower", "release" or "retreat". It only
    describes the last action.
    """

    action_spec = ActionSpec()

    def __init__(self, env: LiberoEnv, item: str, target: str) -> None:
        self.item, self.target = item, target
        self.phase = "none"
        self._env = env
        self._plan: Plan | None = None
        world = env.privileged()
        model, robot = world.model, world.domain.robots[0]
        sites = [model.site(number).name for number in range(model.nsite)]
        if item not in world.body_ids or (target not in world.body_ids and target not in sites):
            raise ConfigurationError(
                f"cannot carry {item!r} to {target!r}: objects are {', '.join(world.body_ids)}, and a region is a site"
            )
        self._model = model
        self._body = world.body_ids[item]
        self._own = geoms_of(model, self._body)
        self._robot = geoms_of(model, model.body(robot.robot_model.root_body).id) | geoms_of(
            model, model.body(robot.robot_model.mount.root_body).id
        )
        self._fingers = [geoms_of(model, model.body(f"gripper0_{side}finger").id) for side in ("left", "right")]
        self._finger_dofs = np.array(robot._ref_gripper_joint_vel_indexes)
        self._hand_site = robot.eef_site_id
        self._target_body = world.body_ids.get(target)
        self._target_site = None if self._target_body is not None else sites.index(target)
        self._base = model.body(robot.robot_model.root_body).id
        # Kinematics and contacts are worked out on a copy, so that they follow from the state and the live simulation,
        # whose solver starts from its last result, takes the same course with and without an expert watching.
        self._data = mujoco.MjData(model)

    def _look(self) -> None:
        live = self._env.privileged().data
        self._data.qpos[:], self._data.qvel[:] = live.qpos, live.qvel
        mujoco.mj_fwdPosition(self._model, self._data)

    def reset(self, instruction: str) -> None:
        """Plans the episode from the state now. Raises EnvironmentFault: there is no grasp."""
        self._look()
        self.phase = "none"
        self._plan = self._make_plan()

    def act(self, observation: Observation) -> ActionStep:
        """The action for the state now; `observation` is not read. Raises ConfigurationError: `reset` comes first."""
        if self._plan is None:
            raise ConfigurationError("the expert has no plan: call reset() before act()")
        self._look()
        action = self._action(self._plan)
        return ActionStep(action, flags={"phase": self.phase})

    def _hand(self) -> np.ndarray:
        return self._data.site_xpos[self._hand_site]

    def _target_position(self) -> np.ndarray:
        if self._target_site is not None:
            return self._data.site_xpos[self._target_site]
        return self._data.xpos[self._target_body]

    def _make_plan(self) -> Plan:
        model, data = self._model, self._data
        scene = Scene(model, data, self._body, self._own, ~(self._own | self._robot))
        origin, rotation = data.xpos[self._body].copy(), data.xmat[self._body].reshape(3, 3).copy()
        points = body_points(model, data, self._body)
        hand, target = self._hand().copy(), self._target_position().copy()
        low, top = float(points[:, 2].min()), float(points[:, 2].max())
        rest = self._resting_height(points - [*origin[:2], low], target)
        move = np.array([*(target[:2] - origin[:2]), rest - low])
        grasp = find_grasp(scene, hand[:2], data.xpos[self._base][:2], move)

        radius = float(np.linalg.norm(points[:, :2] - origin[:2], axis=1).max())
        way_there = scene.heights(corridor(hand[:2], grasp.position[:2], 0.06), own=False).max()
        hover = max(top + 0.05, float(way_there) + CLEARANCE + FINGERTIP)

        # The object clears what it passes over, and so does the palm, which is wider but higher up.
        under_object = scene.heights(corridor(origin[:2], target[:2], radius + 0.01), own=False).max()
        drop = grasp.position[:2] + move[:2]
        under_palm = scene.heights(corridor(grasp.position[:2], drop, PALM_HALF_LENGTH), own=False).max()
        palm = float(grasp.position[2] - origin[2]) + PALM
        carry = max(float(under_object) + origin[2] - low, float(under_palm) - palm) + CLEARANCE
        return Plan(
            offset=grasp.position - origin,
            rotation=rotation,
            yaw=grasp.yaw,
            points=(points - origin) @ rotation,
            hover=hover,
            carry=max(carry, float(origin[2]) + 0.05),
            rest=rest - float(target[2]),
        )

    def _resting_height(self, points: np.ndarray, target: np.ndarray) -> float:
        """The height at which the object's lowest point comes to rest when it is let down over `target`.

        points: (n, 3) m, the object's, from the point at its bottom right below its origin.
        """
        bottom = points[points[:, 2] < 0.02]
        supports = heights(self._model, self._data, target[:2] + bottom[:, :2], ~(self._own | self._robot))
        return float((supports - bottom[:, 2]).max())

    def _held(self) -> bool:
        """Whether both fingers touch the object."""
        pairs = self._data.contact.geom
        return all(bool((self._own[pairs] & finger[pairs[:, ::-1]]).any()) for finger in self._fingers)

    def _action(self, plan: Plan) -> np.ndarray:
        data = self._data
        hand, origin = self._hand(), data.xpos[self._body]
        rotation = data.xmat[self._body].reshape(3, 3)
        bottom = float(origin[2] + (plan.points @ rotation[2]).min())
        held = self._held()

        target = self._target_position()
        drop = np.array([*target[:2], origin[2] + target[2] + plan.rest + PLACE_GAP - bottom])
        off_target = float(np.linalg.norm(drop[:2] - origin[:2]))
        placed = off_target < PLACE_NEAR and bottom < target[2] + plan.rest + PLACE_LEVEL
        if placed:
            offset, turn, close = np.array([0.0, 0.0, 0.0 if held else RETREAT]), np.zeros(3), False
            self.phase = "release" if held else "retreat"
        elif held:
            # A hold that is not firm yet, because the fingers still close, moves in proportion to how firm it is.
            firm = 1.0 - min(float(np.abs(data.qvel[self._finger_dofs]).max()) / STILL, 1.0)
            steer = funnel(origin, drop, max(plan.carry, float(drop[2])))
            offset, turn, close = firm * (steer - origin), turn_to(self._hand_axes(), plan.yaw), True
            near = off_target < 0.03
            self.phase = "close" if firm < 0.5 else "lower" if near else "carry" if self._across(offset) else "lift"
        else:
            offset, turn, close = self._to_grasp(plan, hand, origin, rotation)
        return servo(offset, turn, close, self.action_spec)

    def _to_grasp(
        self, plan: Plan, hand: np.ndarray, origin: np.ndarray, rotation: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """(offset (3,) m, turn (3,) rad, close) of a gripper that does not hold the object yet."""
        turned = heading(rotation @ plan.rotation.T)
        grasp = origin + rotation_about_z(turned) @ plan.offset
        turn = turn_to(self._hand_axes(), plan.yaw + turned)
        hover = max(plan.hover, float(grasp[2]) + 0.05)
        steer = funnel(hand, grasp, hover, astray=TURN_LEVER * float(np.linalg.norm(turn)))
        off = grasp - hand
        away = float(np.linalg.norm(off[:2]))
        close = away < GRASP_NEAR and abs(float(off[2])) < GRASP_LEVEL
        self.phase = "close" if close else "descend" if away < 0.03 else "approach"
        return steer - hand, turn, close

    def _hand_axes(self) -> np.ndarray:
        return self._data.site_xmat[self._hand_site].reshape(3, 3)

    @staticmethod
    def _across(offset: np.ndarray) -> bool:
        return float(np.linalg.norm(offset[:2])) > abs(float(offset[2]))
