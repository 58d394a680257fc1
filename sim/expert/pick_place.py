"""Pick an object up and put it down.

A plan is made at the start of an episode: where to hold the object, and how high to travel. After that no step
remembers the one before: the action follows from positions, velocities and contacts now. Only an object that comes to
rest elsewhere, or otherwise turned, without having been put there, is planned for again; and so is one whose target has
moved.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sim.env import LiberoEnv
from sim.errors import ConfigurationError, EnvironmentFault
from sim.expert.expert import Expert
from sim.expert.geometry import body_points, geoms_of, heading, rotation_about_z
from sim.expert.grasp import FINGERS_HALF_LENGTH, FINGERTIP, MAX_OPENING, Scene
from sim.expert.hand import Hand
from sim.expert.plan import Plan, make_plan
from sim.expert.servo import funnel

# All of these are our choice. Lengths in metres.
TURN_LEVER = 0.04  # a wrist that is 1 rad off counts as this distance from the goal
GRASP_NEAR, GRASP_LEVEL = 0.010, 0.010  # horizontal and vertical distance at which the fingers close
PLACE_NEAR, PLACE_LEVEL = 0.015, 0.010  # the same for letting go
PLACE_GAP = 0.004  # over the resting height, where a carried object is steered to
STILL = 0.02  # m/s: fingers that move slower have a firm hold
RETREAT = 0.08  # how far up to go afterwards
LEAVING = 0.10  # horizontal distance from the target within which things may hang over the object
SIDEWAYS, LEAST_LIFT = 0.05, 0.004  # how far to steer to the side, and up, from under them
OVERHANG = 1.15  # times its size: what must be free above an object
HULL_POINTS = 32
SHOULDER = 0.333  # of the Panda above its base, and
ARM = 1.0  # a little more than it reaches from there
AT_REST = 0.02  # m/s and rad/s
MOVED, TIPPED = 0.015, 0.3  # m and rad from where it was planned for, beyond which the object is planned for again


class PickPlaceExpert(Expert):
    """Carries `item` to `target`.

    item: a movable object's name.  target: an object's or a region's name.  container: whether it goes into the target,
    else onto it.  lift: whether it is lifted on the way; else it is pushed along what it lies on.
    beside: where in a region it goes, from -1 to 1 of the region's half size along its x axis.
    phase: "approach", "descend", "close", "lift", "carry", "lower", "release", "retreat", or "lost" where the object
    lies so that nothing can take hold of it.
    """

    def __init__(
        self,
        env: LiberoEnv,
        item: str,
        target: str,
        container: bool = False,
        lift: bool = True,
        beside: float = 0.0,
        hand: Hand | None = None,
    ) -> None:
        super().__init__(env, hand)
        self.item, self.target, self.container, self.lift = item, target, container, lift
        self._beside = beside
        self._plan: Plan | None = None
        world, model = env.privileged(), self._hand.model
        sites = [model.site(number).name for number in range(model.nsite)]
        if item not in world.body_ids or (target not in world.body_ids and target not in sites):
            raise ConfigurationError(
                f"cannot carry {item!r} to {target!r}: objects are {', '.join(world.body_ids)}, and a region is a site"
            )
        self._body = world.body_ids[item]
        self._own = geoms_of(model, self._body)
        first = model.body_dofadr[self._body]
        if model.body_dofnum[self._body] != 6:
            raise ConfigurationError(f"cannot carry {item!r}: it is fixed to the scene")
        self._item_dofs = slice(first, first + 6)
        self._target_body = world.body_ids.get(target)
        self._target_site = None if self._target_body is not None else sites.index(target)

    def reset(self, instruction: str) -> None:
        super().reset(instruction)
        if self._plan is None:
            raise EnvironmentFault(f"no grasp of {self.item!r}: every side is wider than the gripper's {MAX_OPENING} m")

    def prepare(self) -> None:
        self._plan = self._make_plan()

    def decide(self) -> np.ndarray:
        if self._plan is None or self._outdated(self._plan):
            self._plan = self._make_plan() or (self._plan and self._moved(self._plan))
        if self._plan is None or not self._within_reach():
            self.phase = "lost"
            return self._hand.action(np.zeros(3), np.zeros(3), False)
        return self._action(self._plan)

    def _within_reach(self) -> bool:
        """Whether the arm is long enough for where the object lies: not under the table, or across the room."""
        shoulder = np.add(self._hand.base, (0.0, 0.0, SHOULDER))
        return float(np.linalg.norm(self._hand.data.xpos[self._body] - shoulder)) < ARM

    def done(self) -> bool:
        return not self.holding() and self._at_goal() and self._clear()

    def holding(self) -> bool:
        return self._hand.holds(self._own)

    @property
    def targets(self) -> np.ndarray:
        if self._plan is None:
            raise ConfigurationError("the expert has no plan: call reset() before asking for its targets")
        hand = self._hand.position
        return np.concatenate([self._grasp(self._plan)[0] - hand, self._target_position() - hand])

    def _outdated(self, plan: Plan) -> bool:
        """Whether the object has come to rest where, or as, `plan` does not expect it, or its target has moved."""
        data = self._hand.data
        moved = float(np.linalg.norm(data.xpos[self._body] - plan.origin))
        tilt = float(np.arccos(np.clip((data.xmat[self._body].reshape(3, 3) @ plan.rotation.T)[2, 2], -1.0, 1.0)))
        away = float(np.linalg.norm(self._target_position() - plan.target))
        if (moved < MOVED and tilt < TIPPED and away < MOVED) or self.holding() or self._placed(plan):
            return False
        return float(np.abs(data.qvel[self._item_dofs]).max()) < AT_REST

    def _moved(self, plan: Plan) -> Plan:
        """The plan for the object as it lies now: held where it was to be held."""
        data = self._hand.data
        origin, rotation = data.xpos[self._body].copy(), data.xmat[self._body].reshape(3, 3).copy()
        grasp, yaw = self._grasp(plan)
        target = self._target_position().copy()
        return replace(plan, origin=origin, rotation=rotation, target=target, offset=grasp - origin, yaw=yaw)

    def _target_position(self) -> np.ndarray:
        data, site = self._hand.data, self._target_site
        if site is None:
            return data.xpos[self._target_body]
        along = data.site_xmat[site].reshape(3, 3)[:, 0]
        return data.site_xpos[site] + self._beside * self._hand.model.site_size[site][0] * along

    def _scene(self) -> Scene:
        hand = self._hand
        return Scene(hand.model, hand.data, self._body, self._own, ~(self._own | hand.geoms))

    def _make_plan(self) -> Plan | None:
        hand = self._hand
        return make_plan(self._scene(), hand.position[:2], hand.base[:2], self._target_position(), self.container)

    def _droop(self, plan: Plan) -> float:
        """Metres by which the object's lowest point hangs lower than planned, because it tilts in the hand."""
        up = self._hand.data.xmat[self._body].reshape(3, 3)[2]
        return float((plan.points @ plan.rotation[2]).min() - (plan.points @ up).min())

    def _above_rest(self, plan: Plan) -> float:
        """Metres by which the object's lowest point is above where it comes to rest at the target."""
        data = self._hand.data
        height, up = data.xpos[self._body][2], data.xmat[self._body].reshape(3, 3)[2]
        return float(height + (plan.points @ up).min() - self._target_position()[2] - plan.rest)

    def _at_goal(self) -> bool:
        return self._env.privileged().holds(("in" if self.container else "on", self.item, self.target))

    def _clear(self) -> bool:
        """Whether the fingers are above the object, or beside it."""
        points = body_points(self._hand.model, self._hand.data, self._body) - self._hand.position
        above = points[:, 2].max() < -FINGERTIP
        return bool(above or np.linalg.norm(points[:, :2], axis=1).min() > FINGERS_HALF_LENGTH)

    def _placed(self, plan: Plan) -> bool:
        """Whether the object is where to let go of it: right over its target, or anywhere inside it."""
        if self.container and self._at_goal():
            return True
        off = self._target_position()[:2] - self._hand.data.xpos[self._body][:2]
        return float(np.linalg.norm(off)) < PLACE_NEAR and self._above_rest(plan) < PLACE_LEVEL

    def _action(self, plan: Plan) -> np.ndarray:
        hand, origin = self._hand, self._hand.data.xpos[self._body]
        held = self.holding()
        if self._placed(plan) or (not held and self._at_goal()):
            offset, turn, close = np.array([0.0, 0.0, 0.0 if held else RETREAT]), np.zeros(3), False
            self.phase = "release" if held else "retreat"
        elif held:
            # A hold that is not firm yet, because the fingers still close, moves in proportion to how firm it is.
            firm = 1.0 - min(hand.finger_speed / STILL, 1.0)
            drop = np.array([*self._target_position()[:2], origin[2] + PLACE_GAP - self._above_rest(plan)])
            ceiling = plan.carry + self._droop(plan) if self.lift else float(origin[2])
            aside = self._sideways(plan, drop)
            offset = firm * (funnel(origin, drop, ceiling) - origin if aside is None else aside)
            turn, close = hand.turn_to(hand.upright(plan.yaw)), True
            self.phase = "close" if firm < 0.5 else self._carry_phase(drop - origin, offset)
        else:
            offset, turn, close = self._to_grasp(plan)
        return hand.action(offset, turn, close)

    def _sideways(self, plan: Plan, drop: np.ndarray) -> np.ndarray | None:
        """(3,) m: where to move an object that something hangs over, such as an open drawer; else None."""
        data = self._hand.data
        origin = data.xpos[self._body]
        if not self.lift or float(np.linalg.norm((drop - origin)[:2])) < LEAVING:
            return None
        points = plan.points[:: 1 + len(plan.points) // HULL_POINTS] @ data.xmat[self._body].reshape(3, 3).T
        around = origin[:2] + OVERHANG * points[:, :2]
        covered = self._scene().heights(around, own=False) > origin[2] + points[:, 2].max()
        if not covered.any():
            return None
        away = -points[covered].mean(0)[:2]
        return np.array([*(SIDEWAYS * away / max(float(np.linalg.norm(away)), 1e-6)), LEAST_LIFT])

    def _grasp(self, plan: Plan) -> tuple[np.ndarray, float]:
        """Where the grip site holds the object now, (3,) m, and the gripper's yaw there, rad."""
        data = self._hand.data
        turned = heading(data.xmat[self._body].reshape(3, 3) @ plan.rotation.T)
        return data.xpos[self._body] + rotation_about_z(turned) @ plan.offset, plan.yaw + turned

    def _to_grasp(self, plan: Plan) -> tuple[np.ndarray, np.ndarray, bool]:
        """(offset (3,) m, turn (3,) rad, close) of a gripper that does not hold the object yet."""
        grasp, yaw = self._grasp(plan)
        hand = self._hand.position
        turn = self._hand.turn_to(self._hand.upright(yaw))
        hover = max(plan.hover, float(grasp[2]) + 0.05)
        astray = TURN_LEVER * float(np.linalg.norm(turn))
        steer = funnel(hand, grasp, hover, astray, slope=plan.slope)
        off = grasp - hand
        away = float(np.linalg.norm(off[:2]))
        close = away < GRASP_NEAR and abs(float(off[2])) < GRASP_LEVEL
        self.phase = "close" if close else "descend" if away < 0.03 else "approach"
        return steer - hand, turn, close

    @staticmethod
    def _carry_phase(off_target: np.ndarray, offset: np.ndarray) -> str:
        if float(np.linalg.norm(off_target[:2])) < 0.03:
            return "lower"
        return "carry" if float(np.linalg.norm(offset[:2])) > abs(float(offset[2])) else "lift"
