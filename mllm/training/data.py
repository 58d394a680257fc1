"""Frames of demonstrations, drawn at random by the step's number and nothing else."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mllm.demonstrations import CAMERAS, Demonstration, decode_image, read_demonstration
from mllm.errors import PolicyError
from mllm.tokenizer import UNKNOWN, Tokenizer


@dataclass(frozen=True)
class Batch:
    """B samples, as the loss takes them.

    images: (B, cameras, S, S, 3) uint8, upright.  proprio: (B, numbers) float64, not normalised.
    texts: token ids a sample.  actions: (B, chunk, 7) float32 labels; known: (B, chunk) bool, False past the end.
    targets: (B, 6) float32 m.  phases: (B,) int64.
    objects: (B, K, cameras, 2) float32, in the order of their names, as `Demonstration.objects`, NaN where unseen.
    """

    images: np.ndarray
    proprio: np.ndarray
    texts: list[list[int]]
    actions: np.ndarray
    known: np.ndarray
    targets: np.ndarray
    phases: np.ndarray
    objects: np.ndarray


class Frames:
    """Every frame of a set of demonstrations in memory, images still encoded.

    A frame's label is the expert's answers from there on, `chunk` of them or up to the episode's end.
    """

    def __init__(
        self,
        demonstrations: Sequence[Demonstration],
        cameras: Sequence[str],
        proprio: Sequence[str],
        phases: list[str],
        objects: Sequence[str] = (),
    ) -> None:
        """phases: names seen so far, to which new ones are added: a phase's number is its place in the list.
        objects: names of those whose places are wanted.
        """
        if not demonstrations:
            raise PolicyError("there are no demonstrations to learn from: collect some first")
        self.images: list[tuple[bytes | np.ndarray, ...]] = []
        for demo in demonstrations:
            missing = [camera for camera in cameras if camera not in demo.images]
            if missing:
                raise PolicyError(f"demonstration {demo.suite} task {demo.task} seed {demo.seed} lacks {missing[0]}")
            self.images += zip(*(demo.images[camera] for camera in cameras), strict=True)
            phases += [name for name in demo.phase_names if name not in phases]
        self.phase_names = phases
        self.actions = np.concatenate([demo.actions for demo in demonstrations]).astype(np.float32)
        self.proprio = np.concatenate(
            [np.concatenate([demo.proprio[name] for name in proprio] or [np.empty((len(demo.actions), 0))], axis=1)
             for demo in demonstrations]
        )  # fmt: skip
        self.targets = np.concatenate([demo.targets for demo in demonstrations]).astype(np.float32)
        self.phases = np.concatenate(
            [np.array([phases.index(name) for name in demo.phase_names])[demo.phases] for demo in demonstrations]
        )
        self.valid = np.concatenate([demo.valid for demo in demonstrations])
        lengths = np.array([len(demo.actions) for demo in demonstrations])
        self.end = np.repeat(np.cumsum(lengths), lengths)
        self.episode = np.repeat(np.arange(len(demonstrations)), lengths)
        self.instructions = [demo.instruction for demo in demonstrations]
        self.objects = np.full((len(self.images), len(objects), len(cameras), 2), np.nan, np.float32)
        for end, demo in zip(np.cumsum(lengths), demonstrations, strict=True):
            order = [camera for camera in CAMERAS if camera in demo.images]
            views = [order.index(camera) for camera in cameras]
            for place, name in enumerate(objects):
                if name in demo.objects:
                    self.objects[end - len(demo.actions) : end, place] = demo.objects[name][:, views]
        self.sources = np.array([demo.source for demo in demonstrations])

    def __len__(self) -> int:
        return len(self.images)

    def weights(self, phase_weights: dict[str, float], source_weights: dict[str, float]) -> np.ndarray:
        """(N,) float64: how often a frame is drawn, by its phase and its demonstration's source; adds up to 1."""
        unknown = sorted(set(phase_weights) - set(self.phase_names))
        if unknown:
            raise PolicyError(f"phase_weights names {unknown[0]!r}: phases are {', '.join(self.phase_names)}")
        of_phase = np.array([phase_weights.get(name, 1.0) for name in self.phase_names])
        of_source = np.array([source_weights.get(str(name), 1.0) for name in self.sources])
        weights = of_phase[self.phases] * of_source[self.episode] * self.valid
        if not weights.sum() > 0:
            raise PolicyError("no frame has a weight above 0: see phase_weights and source_weights")
        return weights / weights.sum()

    def batch(self, index: np.ndarray, chunk: int, tokenizer: Tokenizer) -> Batch:
        """The frames at index, (B,)."""
        ahead = index[:, None] + np.arange(chunk)
        inside = ahead < self.end[index][:, None]
        ahead = np.where(inside, ahead, index[:, None])
        images = [
            np.stack([decode_image(view) if isinstance(view, bytes) else view for view in self.images[i]])
            for i in index
        ]
        return Batch(
            images=np.stack(images),
            proprio=self.proprio[index],
            texts=[tokenizer.prompt(self.instructions[self.episode[i]]) for i in index],
            actions=self.actions[ahead],
            known=inside & self.valid[ahead],
            targets=self.targets[index],
            phases=self.phases[index].astype(np.int64),
            objects=self.objects[index],
        )


def find_demonstrations(folders: Sequence[str]) -> list[Path]:
    """Every episode file under the folders, in the order of their names. Raises PolicyError: a folder has none."""
    found: list[Path] = []
    for folder in folders:
        own = sorted(Path(folder).glob("**/seed_*.hdf5"))
        if not own:
            raise PolicyError(f"there are no demonstrations under {folder}: run `flashvla collect {folder}` first")
        found += own
    return found


def load_demonstrations(paths: Sequence[Path]) -> tuple[list[Demonstration], str]:
    """The demonstrations, and a digest of what they are. Raises PolicyError naming a file that is damaged."""
    digest = hashlib.sha256()
    demos = []
    for path in paths:
        demo = read_demonstration(path)
        digest.update(f"{demo.suite} {demo.task} {demo.seed} {demo.source}".encode())
        digest.update(np.ascontiguousarray(demo.actions).tobytes())
        demos.append(demo)
    return demos, digest.hexdigest()


def source_of(demo: Demonstration) -> str:
    """Its source, but for beginnings: the expert's failures are not kept, so what ended without success was cut."""
    return "beginnings" if demo.source == "expert" and not demo.success else demo.source


def count_episodes(demos: Iterable[Demonstration]) -> list[dict[str, Any]]:
    """How many episodes of each suite and source, and their first and last seed, as JSON can hold it."""
    seeds: dict[tuple[str, str], list[int]] = {}
    for demo in demos:
        seeds.setdefault((demo.suite, source_of(demo)), []).append(demo.seed)
    return [
        {"suite": suite, "source": source, "episodes": len(own), "seeds": [min(own), max(own)]}
        for (suite, source), own in sorted(seeds.items())
    ]


def names_by_word(demos: Sequence[Demonstration], tokenizer: Tokenizer) -> dict[int, str]:
    """Id of the first word -> name, of the objects that the demonstrations show, where the tokenizer knows the word and
    no other object begins with it.
    """
    names = sorted({name for demo in demos for name in demo.objects})
    words = {name: tokenizer.word(name.split()[0]) for name in names}
    counted = Counter(words.values())
    return {words[name]: name for name in names if words[name] != UNKNOWN and counted[words[name]] == 1}


def held_out(demo: Demonstration, share: float) -> bool:
    """Whether an episode is for validation: by its task and seed, so that it stays so when others come."""
    key = hashlib.sha256(f"{demo.suite} {demo.task} {demo.seed}".encode()).digest()
    return int.from_bytes(key[:4], "little") < share * 2**32
