"""The command that quantises a policy."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from flashvla_ros.errors import ConfigurationError
from flashvla_ros.fields import json_object

if TYPE_CHECKING:
    from mllm.diffusion.tune import TuneConfig
    from mllm.sweep import Clip
    from mllm.vla_policy import VLAPolicy


@dataclass(frozen=True)
class Quantize:
    """Quantise a policy's linear layers, and write a folder of weights, which every other command takes as a policy.

    The ranges of the layers' inputs come from observations. Prints what became of every layer, and how far the actions
    are from the policy's own on observations of other episodes; report.json and report.png in the folder say it too.
    """

    policy: tyro.conf.Positional[str] = "mini"
    """mini, or a folder of weights."""
    out: Path = Path("runs/quantized")
    """Folder to write."""
    bits: Literal[4, 6, 8] = 4
    """Of weights."""
    act_bits: Literal[4, 6, 8, 16] = 6
    """Of the inputs of layers; 16 leaves them as they are. The decoder's do not take 4 well."""
    family: Literal["msfp", "signed", "int", "int-minmax"] = "msfp"
    """msfp: floating point, without a sign where the inputs are anomalous. Compare with signed floating point, integers
    by the same search, and integers by the largest magnitude."""
    least: str = "{}"
    """JSON object: pattern of layers' names -> least bits of their weights and inputs, such as {"*.o_proj": [4, 6]}."""
    calibration: str = "default"
    """Folder that flashvla collect wrote; or default: the policy plays a few episodes."""
    suite: tuple[str, ...] = ("libero_spatial", "libero_object")
    """Of these episodes."""
    tasks: str = "0,3,6,9"
    """Of these episodes: indices, or all; one episode each."""
    workers: int = 2
    """Processes that play them."""
    observations: int = 256
    """Looked at for the ranges."""
    check: int = 64
    """Looked at to compare the actions, of other episodes."""
    sensitivity: bool = False
    """Also quantise every group of layers alone, to see which of them cost most."""
    nearest: bool = False
    """Round every weight to the nearest number, and not so that weights and bias make up for it (GPTQ)."""
    talora: bool = False
    """Of a policy with a diffusion head: the head has as few bits as the rest, but for its first and last layers, and
    is fine-tuned without data by adapters of low rank, of which each step of the sampler has one; they are merged
    before quantising."""
    dfa: bool = False
    """With --talora: a step's error counts as much as the sampler makes of it."""
    adapters: int = 2
    """Of TALoRA, in each layer; 1 is plain LoRA."""
    rank: int = 2
    """Of an adapter."""
    updates: int = 1200
    """Of TALoRA's fine-tuning."""
    seed: int = 0
    """Of the episodes and of what is drawn from them."""
    json: bool = False
    """Print the report as JSON on stdout; everything else goes to stderr."""

    def run(self) -> int:
        from fnmatch import fnmatchcase

        from torch import nn

        from flashvla_ros.quantize import quantize
        from mllm.diffusion.tune import diffusion_head
        from mllm.policy import make_policy
        from mllm.quantise import group_of, vla_config
        from mllm.vla_policy import VLAPolicy

        if self.observations < 1 or self.check < 1:
            raise ConfigurationError(
                f"--observations is {self.observations} and --check {self.check}: both must be 1 or more"
            )
        policy = make_policy(self.policy)
        if not isinstance(policy, VLAPolicy):
            raise ConfigurationError(f"policy '{self.policy}' is no model of mllm: name mini or a folder of weights")
        tune = self.tune()
        if tune is not None:
            diffusion_head(policy.model)
        config = vla_config(self.bits, None if self.act_bits == 16 else self.act_bits, self.family, tune is not None)
        least = json_object("--least", self.least)
        names = [name for name, part in policy.model.named_modules() if isinstance(part, nn.Linear)]
        if strange := [pattern for pattern in least if not any(fnmatchcase(name, pattern) for name in names)]:
            known = ", ".join(sorted({group_of(name) for name in names}))
            raise ConfigurationError(f"--least names '{strange[0]}', which fits no linear layer; there are {known}")
        config = replace(config, compensate=not self.nearest, least={**config.least, **least})
        facts = {"policy": self.policy, "calibration": self.calibration, "seed": self.seed}
        quantize(policy, config, self.clips(policy), self.check, self.out, facts, self.sensitivity, self.json, tune)
        return 0

    def tune(self) -> TuneConfig | None:
        from mllm.diffusion.tune import TuneConfig
        from quant.dfa import DistilConfig
        from quant.talora import TaloraConfig

        if not self.talora:
            if self.dfa:
                raise ConfigurationError("--dfa says how --talora fine-tunes: give both")
            return None
        distil = DistilConfig(self.updates, seed=self.seed)
        return TuneConfig(TaloraConfig(self.adapters, self.rank, seed=self.seed), distil, self.dfa)

    def clips(self, policy: VLAPolicy) -> list[Clip]:
        """Recorded observations, each with those that follow until the policy looks again."""
        import tempfile

        from mllm.sweep import draw_clips

        count = self.observations + self.check
        if self.calibration != "default":
            return draw_clips(self.calibration, count, policy.execute, self.seed)
        with tempfile.TemporaryDirectory() as folder:
            self.play(policy, Path(folder))
            return draw_clips(folder, count, policy.execute, self.seed)

    def play(self, policy: VLAPolicy, folder: Path) -> None:
        """Lets the policy play, and keeps the episodes as demonstrations. Raises ConfigurationError: one broke."""
        from flashvla_ros.cli_data import Line
        from sim.collect import CollectConfig, collect
        from sim.dagger import PolicyMix
        from sim.schedule import parse_tasks

        render = {name: value for name, value in policy.render.items() if name in ("renderer", "image_size")}
        for suite in self.suite:
            sys.stderr.write(f"{self.policy} plays {suite} to see what its layers are given\n")
            config = CollectConfig(
                suite=suite,
                tasks=parse_tasks(suite, self.tasks),
                episodes=1,
                seed=self.seed,
                images="webp",
                policy=PolicyMix(self.policy, beta=0.0),
                **render,  # type: ignore[arg-type]
            )
            end = collect(config, folder, self.workers, Line())
            if end.errors:
                raise ConfigurationError(f"{end.errors} episodes of {suite} broke off: give --calibration a folder")


COMMANDS = {"quantize": Quantize}
