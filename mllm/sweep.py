"""Arms of a sweep, and what they do on recorded observations: the same clips of demonstrations for each of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mllm.compress import CompressConfig
from mllm.demonstrations import Images, decode_image, demonstration_files, read_demonstration
from mllm.errors import PolicyError
from mllm.policy import ActionStep, Observation, Policy
from mllm.reuse import GRIPPER, POSE, ReuseConfig, overlap_of


@dataclass(frozen=True)
class Arm:
    """One way to run a policy; the default is the policy as it is, the reference of every sweep.

    weights: a folder of weights in place of the policy's own, such as a quantised model; "" keeps these.
    """

    compress: CompressConfig = field(default_factory=CompressConfig)
    reuse: ReuseConfig = field(default_factory=ReuseConfig)
    weights: str = ""

    @property
    def name(self) -> str:
        """Such as "flashvla-80-gated", with whatever else is not the default, and "@FOLDER" last where weights are in
        one; the reference's is "none-off".
        """
        way, rule = _changed(self.compress), _changed(self.reuse)
        method, mode = way.pop("method", "none"), rule.pop("mode", "off")
        if method != "none":
            way.pop("keep", None)
            method = f"{method}-{self.compress.keep}"
        extras = [[f"-{name}={json.dumps(value)}" for name, value in part.items()] for part in (way, rule)]
        folder = f"@{Path(self.weights).name}" if self.weights else ""
        return f"{method}{''.join(extras[0])}-{mode}{''.join(extras[1])}{folder}"

    @property
    def options(self) -> dict[str, Any]:
        """Of `mllm.policy.make_policy`; of the reference none, so that every policy can be one."""
        found: dict[str, Any] = {"checkpoint": self.weights} if self.weights else {}
        if self.compress.method != "none":
            way = _changed(self.compress)
            found["keep"] = self.compress.keep
            way.pop("keep", None)
            found["compress"] = way if len(way) > 1 else self.compress.method
        if self.reuse.mode != "off":
            rule = _changed(self.reuse)
            found["reuse"] = rule if len(rule) > 1 else self.reuse.mode
        return found


def _changed(config: CompressConfig | ReuseConfig) -> dict[str, Any]:
    return {one.name: value for one in fields(config) if (value := getattr(config, one.name)) != one.default}


def grid(
    methods: Sequence[str | Mapping[str, Any]],
    keeps: Sequence[int],
    reuses: Sequence[str | Mapping[str, Any]],
    weights: Sequence[str] = (),
) -> list[Arm]:
    """The reference first, then every method with every number of kept tokens under every rule of reuse, each once,
    with the policy's weights and with those of each folder.

    methods, keeps: see `CompressConfig.parse`; "none" keeps all, so that `keeps` says nothing to it.
    reuses: see `ReuseConfig.parse`.  weights: folders with names of their own.
    Raises PolicyError: one of them is not known, or two folders have one name.
    """
    ways: list[CompressConfig] = []
    for method in methods:
        chosen = CompressConfig.parse(method)
        ways += [CompressConfig()] if chosen.method == "none" else [replace(chosen, keep=keep) for keep in keeps]
    rules = [ReuseConfig.parse(reuse) for reuse in reuses]
    rules = [rule if rule.mode != "off" else ReuseConfig() for rule in rules]
    names = [Path(folder).name for folder in weights]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PolicyError(f"two folders of weights are called '{twice[0]}': their arms would have one name; rename one")
    arms = (Arm(way, rule, folder) for folder in ("", *weights) for way in ways for rule in rules)
    return list(dict.fromkeys([Arm(), *arms]))


@dataclass(frozen=True)
class Clip:
    """Consecutive frames of a demonstration, T of them; images as they are stored."""

    path: Path
    start: int
    instruction: str
    images: Mapping[str, Images]
    proprio: Mapping[str, np.ndarray]

    def observations(self) -> Iterator[Observation]:
        for step in range(len(self.proprio["eef_pos"])):
            frames = {name: images[step] for name, images in self.images.items()}
            seen = {name: decode_image(one) if isinstance(one, bytes) else one for name, one in frames.items()}
            yield Observation(seen, {name: numbers[step] for name, numbers in self.proprio.items()}, step / 20)


def draw_clips(root: Path | str, count: int, steps: int, seed: int = 0) -> list[Clip]:
    """`count` clips of `steps` frames, evenly spread over the demonstrations under `root` in the order of their paths,
    and drawn by `seed` within them; a shorter demonstration is taken whole.

    Raises PolicyError: nothing is there, or it is damaged.
    """
    if count < 2 or steps < 1:
        raise PolicyError(f"{count} clips of {steps} frames: at least 2 are needed, of at least 1 frame")
    files = demonstration_files(root)
    if not files:
        raise PolicyError(f"there are no demonstrations under {root}: collect some with flashvla collect")
    generator = np.random.default_rng(seed)
    places = (np.arange(count) + generator.random()) * len(files) / count
    clips = []
    for place in places.astype(int):
        demo = read_demonstration(files[place])
        start = int(generator.integers(max(1, len(demo.actions) - steps + 1)))
        part = slice(start, start + steps)
        images = {name: frames[part] for name, frames in demo.images.items()}
        proprio = {name: numbers[part] for name, numbers in demo.proprio.items()}
        clips.append(Clip(files[place], start, demo.instruction, images, proprio))
    return clips


@dataclass(frozen=True)
class Replay:
    """What a policy answered to n clips.

    actions: of each clip (T, 7), one for each of its frames.
    flops, visual_flops: (n,), a step, those in which the model did not run included; NaN where the policy tells none.
    reused: (n,), share of the steps.
    overlap: (n,), the share of a look's kept tokens that the look before kept too, mean; NaN where all are kept.
    """

    actions: list[np.ndarray]
    flops: np.ndarray
    visual_flops: np.ndarray
    reused: np.ndarray
    overlap: np.ndarray


def replay(policy: Policy, clips: Sequence[Clip]) -> Replay:
    """Plays every clip as an episode of its own. What the policy answers moves nothing: the next frame is the recorded
    one, so that all policies see the same.
    """
    actions: list[np.ndarray] = []
    rows: list[tuple[float, ...]] = []
    for clip in clips:
        policy.reset(clip.instruction)
        steps = [policy.act(observation) for observation in clip.observations()]
        actions.append(np.stack([step.action for step in steps]))
        kept = [step.kept for step in steps if step.kept is not None]
        overlaps = [overlap_of(before, last) for before, last in pairwise(kept)]
        rows.append(
            (
                _a_step(steps, "flops"),
                _a_step(steps, "visual_flops"),
                float(np.mean([bool(step.flags.get("reuse")) for step in steps])),
                float(np.mean(overlaps)) if overlaps else float("nan"),
            )
        )
    return Replay(actions, *np.array(rows).T)


def _a_step(steps: Sequence[ActionStep], flag: str) -> float:
    found = [step.flags[flag] for step in steps if flag in step.flags]
    return sum(found) / len(steps) if found else float("nan")


def deviation(reference: Replay, other: Replay) -> dict[str, np.ndarray]:
    """How far the actions of `other` are from those of `reference`, each (n,), a clip's mean over its steps.

    "error": mean absolute difference of the six numbers of the pose, in units of `ActionSpec`.
    "gripper": share of steps with another command of the gripper.
    "agreement": share of the seven numbers that are equal; of a policy that speaks in tokens these are equal tokens,
        but for the gripper, of whose tokens many mean one command.
    """
    pairs = list(zip(reference.actions, other.actions, strict=True))
    return {
        "error": np.array([np.abs(a[:, POSE].astype(float) - b[:, POSE]).mean() for a, b in pairs]),
        "gripper": np.array([((a[:, GRIPPER] > 0) != (b[:, GRIPPER] > 0)).mean() for a, b in pairs]),
        "agreement": np.array([(a == b).mean() for a, b in pairs]),
    }
