"""The policy interface: what a robot node, an evaluation and a server all call.

A third party's policy is any class with `reset` and `act`, named in the `flashvla.policies` entry-point group:

    class MyPolicy:
        action_spec = ActionSpec()
        def __init__(self, gain: float = 1.0): ...
        def reset(self, instruction: str) -> None: ...
        def act(self, observation: Observation) -> ActionStep:
            return ActionStep(action=np.zeros(7, np.float32))

It may have more: `begin` and `act_batch` (see `BatchedPolicy`), `configure` (see `Tunable`), `warm_up()`, called before
the first episode, `clear()`, called where a command was not carried out as proposed, `layout` (see `TokenLayout`),
`render` (see `sim.evaluate`), and `provenance`, texts about itself that results carry.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mllm.errors import PolicyError

# LIBERO's proprioception; see `Observation`.
PROPRIO_SIZES = {"eef_pos": 3, "eef_quat": 4, "gripper_qpos": 2, "joint_pos": 7, "joint_vel": 7}
ENTRY_POINT_GROUP = "flashvla.policies"


@dataclass(frozen=True)
class ActionSpec:
    """What the 7 numbers of an action mean, so that two sides that disagree fail before the robot moves.

    An action is (dx, dy, dz, rx, ry, rz, gripper), float32, each in [-1, 1]:
    translation in `frame` (1 = `translation_scale` metres), rotation as an axis-angle vector in `frame`
    (1 = `rotation_scale` radians), both per control step of 1 / `control_freq` seconds, and the gripper
    (-1 open, +1 close). The defaults are LIBERO's.
    """

    frame: str = "world"
    translation_scale: float = 0.05
    rotation_scale: float = 0.5
    control_freq: float = 20.0

    def __post_init__(self) -> None:
        for name in ("translation_scale", "rotation_scale", "control_freq"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise PolicyError(f"ActionSpec.{name} is {value}: it must be a finite number above 0")


@dataclass(frozen=True)
class Observation:
    """One instant of the robot.

    images: camera name -> (H, W, 3) uint8 RGB, upright (first row is the top of the scene).
    proprio: name -> float64 vector. LIBERO's: "eef_pos" (3,) m and "eef_quat" (4,) xyzw, both in the world frame;
        "gripper_qpos" (2,) m, one a finger; "joint_pos" (7,) rad.
    stamp: time of the instant in seconds (simulated or robot time).
    """

    images: Mapping[str, np.ndarray]
    proprio: Mapping[str, np.ndarray] = field(default_factory=dict)
    stamp: float = 0.0


@dataclass(frozen=True)
class ActionStep:
    """What a policy answers to one observation.

    action: (7,) float32, as `ActionSpec` says.
    timing: stage -> seconds spent in it.
    flags: anything else worth recording about the step; values are numbers, booleans or short strings.
    kept: (K,) int64, ascending: which visual tokens the decoder kept, counted over all cameras in the model's order;
        None where it chose none, or did not run.
    merged: (M, 2) int64, counted likewise: a token that is gone, and the kept one that it is part of now; None where
        the decoder merges none, or did not run.
    plan: (n, 7) float32, from a policy that predicts several actions, where it looked: `action` and those after it,
        also the ones that it will not carry out before it looks again.
    left: actions of an earlier look that follow this one; at 0 the next observation is looked at.
    looks: whether anybody looks at the next observation's images; where not, they need not be drawn.
    """

    action: np.ndarray
    timing: Mapping[str, float] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    kept: np.ndarray | None = None
    merged: np.ndarray | None = None
    plan: np.ndarray | None = None
    left: int = 0
    looks: bool = True


@dataclass(frozen=True)
class TokenLayout:
    """Where a policy's visual tokens lie, which `ActionStep.kept` counts: camera after camera, row after row.

    cameras: names in `Observation.images`.  rows, columns: tokens of an image.
    area: the middle share of the image's area that the model sees.  mirror: it sees that with left and right exchanged.
    """

    cameras: tuple[str, ...]
    rows: int
    columns: int
    area: float = 1.0
    mirror: bool = False

    @property
    def tokens(self) -> int:
        return len(self.cameras) * self.rows * self.columns


def check_action(action: np.ndarray) -> np.ndarray:
    """The action as (7,) float32. Raises PolicyError unless it has that shape and every number is in [-1, 1]."""
    checked = np.asarray(action, np.float32)
    if checked.shape != (7,):
        raise PolicyError(f"an action has shape {checked.shape}: it must be (7,)")
    wrong = ~(np.abs(checked) <= 1)  # also true for NaN
    if wrong.any():
        index = int(np.argmax(wrong))
        raise PolicyError(f"action[{index}] is {checked[index]}: it must be from -1 to 1; clip it in the policy")
    return checked


@runtime_checkable
class Policy(Protocol):
    """`reset` starts an episode; `act` answers one observation. Both are called from one thread."""

    action_spec: ActionSpec

    def reset(self, instruction: str) -> None: ...

    def act(self, observation: Observation) -> ActionStep: ...


@runtime_checkable
class BatchedPolicy(Policy, Protocol):
    """A policy that answers several episodes at once; what it remembers of each is what `begin` gave."""

    def begin(self, instruction: str) -> Any: ...

    def act_batch(self, episodes: Sequence[Any], observations: Sequence[Observation]) -> list[ActionStep]: ...


@runtime_checkable
class Tunable(Protocol):
    """A policy of which some options can change while it acts.

    `configure` takes options of the constructor, which hold from the next observation on; the thread that acts calls
    it. Raises PolicyError: an option is unknown, cannot change, or has a wrong value; then none has changed.
    """

    def configure(self, **options: Any) -> None: ...


class HoldPolicy:
    """Commands no motion and an open gripper, for ever: to try out a graph, or to measure what it costs."""

    action_spec = ActionSpec()

    def reset(self, instruction: str) -> None:
        pass

    def act(self, observation: Observation) -> ActionStep:
        return ActionStep(action=np.array([0, 0, 0, 0, 0, 0, -1], np.float32))


def provenance_of(policy: Policy | None) -> dict[str, str]:
    """What a policy says about itself in its optional attribute `provenance`; empty where it says nothing."""
    return {str(name): str(value) for name, value in (getattr(policy, "provenance", None) or {}).items()}


def policy_names() -> list[str]:
    """Names of every installed policy, sorted."""
    return sorted({entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)})


def make_policy(name: str, **options: Any) -> Policy:
    """Builds the policy that `name` stands for in the `flashvla.policies` entry-point group, or the one in a folder of
    that name, which `mllm.checkpoint.save_checkpoint` wrote: `mllm.vla_policy.mini_policy`.

    options: keyword arguments of the policy's constructor; "reuse" aside, which any policy can be given: see
        `mllm.reuse.ReuseConfig.parse`.
    Raises PolicyError: unknown name, unknown or missing option, or an object without the interface.
    """
    reuse = options.pop("reuse", None)
    factory = _find(name)
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise PolicyError(f"policy '{name}' cannot be made with options {options}: {error}") from error
    policy = factory(**options)
    if not isinstance(policy, Policy):
        raise PolicyError(f"policy '{name}' is a {type(policy).__name__}, which lacks reset, act or action_spec")
    if reuse is None:
        return policy
    from mllm.reuse import ReuseConfig
    from mllm.reuse_policy import with_reuse

    return with_reuse(policy, ReuseConfig.parse(reuse))


def _find(name: str) -> Callable[..., Any]:
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == name:
            return entry.load()  # type: ignore[no-any-return]
    if Path(name).is_dir():
        from mllm.vla_policy import mini_policy

        return partial(mini_policy, name)
    installed = ", ".join(policy_names()) or "none"
    raise PolicyError(f"no policy is called '{name}', and there is no folder {name}; installed: {installed}")
