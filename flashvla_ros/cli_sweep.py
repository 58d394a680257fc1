"""The command that tries many ways to run a policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from flashvla_ros.cli_options import EpisodeOptions, name_or_object
from flashvla_ros.fields import json_object

if TYPE_CHECKING:
    from mllm.sweep import Arm


@dataclass(frozen=True)
class Grid:
    """The arms: none-off first, which all are compared with, then every method, with every number kept, under every
    rule of reuse, with the policy's weights and with others.
    """

    methods: tuple[str, ...] = ("none", "flashvla", "tokencarve", "random")
    """none (which keeps all), flashvla, tokencarve, fastv, random, uniform, or JSON objects of settings."""
    keeps: tuple[int, ...] = (80,)
    """Visual tokens that stay."""
    reuses: tuple[str, ...] = ("off", "gated")
    """off, paper, gated, or JSON objects of settings."""
    weights: tuple[str, ...] = ()
    """Folders of other weights, such as flashvla quantize writes; of different names."""
    policy: str = "mini"
    """Name of an installed policy, or a folder of weights."""
    options: str = "{}"
    """JSON object: keyword arguments of the policy's constructor."""

    def arms(self) -> list[Arm]:
        """Raises ConfigurationError, PolicyError: one is not known."""
        from mllm.sweep import grid

        methods = [name_or_object("--methods", text) for text in self.methods]
        return grid(methods, self.keeps, [name_or_object("--reuses", text) for text in self.reuses], self.weights)


@dataclass(frozen=True)
class SweepOpen:
    """On recorded observations: how far each arm's actions are from those of the policy as it is, on the same frames.

    Clips of demonstrations are played to the policy, whose answers move nothing.
    """

    demonstrations: tyro.conf.Positional[Path]
    """Folder of demonstrations, as flashvla collect writes them."""
    grid: Grid = field(default_factory=Grid)
    clips: int = 100
    """Drawn evenly over the demonstrations."""
    frames: int = 24
    """Of a clip."""
    seed: int = 0
    """Of the draw."""
    json: bool = False
    """Print the result as JSON on stdout; everything else goes to stderr."""

    def run(self) -> int:
        from flashvla_ros.sweep_table import show_open_loop
        from mllm.sweep import draw_clips
        from sim.sweep import open_loop

        arms, options = self.grid.arms(), json_object("--options", self.grid.options)
        clips = draw_clips(self.demonstrations, self.clips, self.frames, self.seed)
        facts = {"policy": self.grid.policy, "options": options, "seed": self.seed}
        show_open_loop(open_loop(self.grid.policy, options, arms, clips), clips, facts, self.json)
        return 0


@dataclass(frozen=True)
class SweepClosed(EpisodeOptions):
    """In closed loop: the same episodes under each arm, which becomes a variant of one run. Success, latency, FLOPs.

    The same command plays what the run still lacks; flashvla report makes a page of it, flashvla compare takes
    FILE:ARM.
    """

    run_file: tyro.conf.Positional[Path] = Path("runs/sweep.sqlite")
    """File of the run (.sqlite), before any option."""
    grid: Grid = field(default_factory=Grid)
    json: bool = False
    """Print the result as JSON on stdout; everything else goes to stderr."""

    def run(self) -> int:
        from flashvla_ros.sweep_table import run_closed_loop

        config = self.config(self.grid.policy, json_object("--options", self.grid.options))
        return run_closed_loop(self.run_file, config, self.grid.arms(), self.keys(), self.execution(), self.json)


@dataclass(frozen=True)
class Sweep:
    """Try methods of compression, numbers of kept tokens and rules of reuse, each against the policy as it is."""

    where: Annotated[SweepOpen, tyro.conf.subcommand("open")] | Annotated[SweepClosed, tyro.conf.subcommand("closed")]

    def run(self) -> int:
        return self.where.run()


COMMANDS = {"sweep": Sweep}
