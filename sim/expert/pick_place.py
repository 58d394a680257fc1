"""Pick an object up and put it down, as a function of the simulator's state alone.

A plan is made at the start of an episode: where to hold the object, and how high to travel. After that no step
remembers the one before: the action follows from positions, velocities and contacts now. So the expert can say what to
do in a state that another policy got into (DAgger, Ross et al. 2011), and one frame is enough to learn its answer from.
Only an object that comes to rest elsewhere, or otherwise turned, without having been put there, is planned for again.
"""

from __future__ import annotations

import mujoco
import numpy as np

from mllm.policy import ActionSpec, ActionStep, Observation
from sim.env import LiberoEnv
from sim.errors import ConfigurationError, EnvironmentFault
from sim.expert.geometry import geoms_of, heading, rotation_about_z
from sim.expert.grasp import MAX_OPENING, Scene
from sim.expert.plan import Plan, make_plan
from sim.expert.servo import servo, turn_to

# All of these are our choice. Lengths in metres.
FUNNEL_SLOPE = 3.0  # rise over run of the way down to a goal
FUNNEL_MOUTH = 0.008  # horizontal distance from which on it rises
TURN_LEVER = 0.04  # a wrist that is 1 rad off counts as this distance from the goal
GRASP_NEAR, GRASP_LEVEL = 0.010, 0.010  # horizontal and vertical distance at which the fingers close
PLACE_NEAR, PLACE_LEVEL = 0.015, 0.010  # the same for letting go
PLACE_GAP = 0.004  # over the resting height, where a carried object is steered to
STILL = 0.02  # m/s: fingers that move slower have a firm hold
RETREAT = 0.08  # how far up to go afterwards
AT_REST = 0.02  # m/s and rad/s
MOVED, TIPPED = 0.015, 0.3  # m and rad from where it was planned for, beyond which the object is planned for again


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

    item: a movable object's name.  target: an object's or a region's name.  container: whether it goes into the target,
    else onto it.
    phase: what it is doing; "approach", "descend", "close", "lift", "carry", "lower", "release", "retreat", or "lost"
    where the object lies so that nothing can take hold of it. It only describes the last action.
    """

    action_spec = ActionSpec()

    def __init__(self, env: LiberoEnv, item: str, target: str, container: bool = False) -> None:
        self.item, self.target, self.container = item, target, container
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
        first = model.body_dofadr[self._body]
        if model.body_dofnum[self._body] != 6:
            raise ConfigurationError(f"cannot carry {item!r}: it is fixed to the scene")
        self._item_dofs = slice(first, first + 6)
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
        if self._plan is None:
            raise EnvironmentFault(f"no grasp of {self.item!r}: every side is wider than the gripper's {MAX_OPENING} m")

    def act(self, observation: Observation) -> ActionStep:
        """The action for the state now; `observation` is not read. Raises ConfigurationError: `reset` comes first."""
        if self._plan is None:
            raise ConfigurationError("the expert has no plan: call reset() before act()")
        self._look()
        plan = self._make_plan() if self._outdated(self._plan) else self._plan
        if plan is None:
            self.phase = "lost"
            return ActionStep(servo(np.zeros(3), np.zeros(3), False, self.action_spec), flags={"phase": self.phase})
        self._plan = plan
        return ActionStep(self._action(plan), flags={"phase": self.phase})

    @property
    def targets(self) -> np.ndarray:
        """(6,) m, world frame, in the state of the last action: from the hand to where it takes hold of the object, and
        to where the object goes. What a policy must find in the images to act as the expert does.
        """
        if self._plan is None:
            raise ConfigurationError("the expert has no plan: call reset() before asking for its targets")
        hand = self._hand()
        return np.concatenate([self._grasp(self._plan)[0] - hand, self._target_position() - hand])

    def _outdated(self, plan: Plan) -> bool:
        """Whether the object has come to rest where, or as, `plan` does not expect it."""
        data = self._data
        moved = float(np.linalg.norm(data.xpos[self._body] - plan.origin))
        tilt = float(np.arccos(np.clip((data.xmat[self._body].reshape(3, 3) @ plan.rotation.T)[2, 2], -1.0, 1.0)))
        if (moved < MOVED and tilt < TIPPED) or self._held() or self._placed(plan):
            return False
        return float(np.abs(data.qvel[self._item_dofs]).max()) < AT_REST

    def _hand(self) -> np.ndarray:
        return self._data.site_xpos[self._hand_site]

    def _target_position(self) -> np.ndarray:
        if self._target_site is not None:
            return self._data.site_xpos[self._target_site]
        return self._data.xpos[self._target_body]

    def _make_plan(self) -> Plan | None:
        scene = Scene(self._model, self._data, self._body, self._own, ~(self._own | self._robot))
        base = self._data.xpos[self._base]
        return make_plan(scene, self._hand()[:2], base[:2], self._target_position(), self.container)

    def _held(self) -> bool:
        """Whether both fingers touch the object."""
        pairs = self._data.contact.geom
        return all(bool((self._own[pairs] & finger[pairs[:, ::-1]]).any()) for finger in self._fingers)

    def _above_rest(self, plan: Plan) -> float:
        """Metres by which the object's lowest point is above where it comes to rest at the target."""
        height, up = self._data.xpos[self._body][2], self._data.xmat[self._body].reshape(3, 3)[2]
        return float(height + (plan.points @ up).min() - self._target_position()[2] - plan.rest)

    def _placed(self, plan: Plan) -> bool:
        """Whether the object is where to let go of it."""
        off = self._target_position()[:2] - self._data.xpos[self._body][:2]
        return float(np.linalg.norm(off)) < PLACE_NEAR and self._above_rest(plan) < PLACE_LEVEL

    def _action(self, plan: Plan) -> np.ndarray:
        data = self._data
        hand, origin = self._hand(), data.xpos[self._body]
        held = self._held()
        if self._placed(plan):
            offset, turn, close = np.array([0.0, 0.0, 0.0 if held else RETREAT]), np.zeros(3), False
            self.phase = "release" if held else "retreat"
        elif held:
            # A hold that is not firm yet, because the fingers still close, moves in proportion to how firm it is.
            firm = 1.0 - min(float(np.abs(data.qvel[self._finger_dofs]).max()) / STILL, 1.0)
            drop = np.array([*self._target_position()[:2], origin[2] + PLACE_GAP - self._above_rest(plan)])
            steer = funnel(origin, drop, plan.carry)
            offset, turn, close = firm * (steer - origin), turn_to(self._hand_axes(), plan.yaw), True
            self.phase = "close" if firm < 0.5 else self._carry_phase(drop - origin, offset)
        else:
            offset, turn, close = self._to_grasp(plan, hand)
        return servo(offset, turn, close, self.action_spec)

    def _grasp(self, plan: Plan) -> tuple[np.ndarray, float]:
        """Where the grip site holds the object now, (3,) m, and the gripper's yaw there, rad."""
        turned = heading(self._data.xmat[self._body].reshape(3, 3) @ plan.rotation.T)
        return self._data.xpos[self._body] + rotation_about_z(turned) @ plan.offset, plan.yaw + turned

    def _to_grasp(self, plan: Plan, hand: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """(offset (3,) m, turn (3,) rad, close) of a gripper that does not hold the object yet."""
        grasp, yaw = self._grasp(plan)
        turn = turn_to(self._hand_axes(), yaw)
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
    def _carry_phase(off_target: np.ndarray, offset: np.ndarray) -> str:
        if float(np.linalg.norm(off_target[:2])) < 0.03:
            return "lower"
        return "carry" if float(np.linalg.norm(offset[:2])) > abs(float(offset[2])) else "lift"
