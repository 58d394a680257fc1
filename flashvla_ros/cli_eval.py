"""The commands of evaluation."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from flashvla_ros.cli_options import EpisodeOptions, PolicyOptions


@dataclass(frozen=True)
class Eval(EpisodeOptions):
    """Evaluate a policy on LIBERO under OpenVLA's protocol, or go on with an evaluation that was stopped.

    Every episode is stored as it ends, as a success, a failure, or an error, which counts as neither. The same command
    plays what the run still lacks.
    """

    policy: str = "mini"
    """Name of an installed policy, a folder of weights, or expert (the scripted one, which reads the simulator)."""
    how: PolicyOptions = field(default_factory=PolicyOptions)
    run_file: tyro.conf.Positional[Path | None] = None
    """File of the run (.sqlite), before any option; runs/POLICY.sqlite if not given."""
    variant: str = ""
    """Name of this configuration within the file, where it has several."""
    through_ros: bool = False
    """Play each episode through the LIBERO graph in lockstep (nodes, messages, gate), one after the other."""
    json: bool = False
    """Print the table as JSON on stdout; everything else goes to stderr."""

    def run(self) -> int:
        from flashvla_ros.evaluation import run_evaluation

        keys, config = self.keys(self.variant), self.config(self.policy, self.how.chosen())
        path = self.run_file or Path("runs") / f"{Path(self.policy).name}.sqlite"
        return run_evaluation(path, config, keys, self.execution(), through_ros=self.through_ros, json_output=self.json)


@dataclass(frozen=True)
class Merge:
    """Put the episodes of several runs into one file: parts of an evaluation, or its variants."""

    out: tyro.conf.Positional[Path]
    """File to write, or to add to."""
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Files of runs."""

    def run(self) -> int:
        from sim.merging import merge

        added, known = merge(self.out, self.runs)
        sys.stdout.write(f"{added} episodes added to {self.out}, {known} were there already\n")
        return 0


@dataclass(frozen=True)
class Compare:
    """Compare two evaluations on the same episodes: success with intervals, McNemar's test, latency, who won where.

    Refuses runs that were not played in the same simulation, from the same states.
    """

    a: tyro.conf.Positional[str]
    """File of a run, or FILE:VARIANT."""
    b: tyro.conf.Positional[str]
    """The same."""
    across: tuple[str, ...] = ()
    """Settings that may differ because they are what is compared, such as env.renderer."""
    common: bool = False
    """Compare the episodes that both have, where one has more."""
    resamples: int = 10_000
    """Of the bootstrap."""
    seed: int = 0
    """Of the bootstrap."""
    json: bool = False
    """Print the result as JSON on stdout."""

    def run(self) -> int:
        from flashvla_ros.comparison import show_comparison
        from flashvla_ros.errors import ConfigurationError
        from sim.statistics import Side, compare_runs

        if self.resamples < 100:
            raise ConfigurationError(f"--resamples is {self.resamples}: an interval needs at least 100")
        comparison = compare_runs(
            Side.parse(self.a), Side.parse(self.b), self.across, self.common, self.resamples, self.seed
        )
        show_comparison(comparison, (self.a, self.b), self.json)
        return 0


@dataclass(frozen=True)
class Report:
    """Write an evaluation as one HTML page that needs no network: tables, plots, videos of failures, provenance."""

    run_file: tyro.conf.Positional[Path]
    """File of the run."""
    out: Path | None = None
    """Page to write; beside the run if not given."""
    videos: int = 24
    """Most videos in the page."""

    def run(self) -> int:
        from sim.report import write_report

        out = self.out or self.run_file.with_suffix(".html")
        write_report(self.run_file, out, self.videos)
        sys.stdout.write(f"{out}\n")
        return 0


@dataclass(frozen=True)
class SwapObjects:
    """Ask a policy for the other object in scenes that hold both, and see to which one it goes."""

    policy: str = "mini"
    """Name of an installed policy, or a folder of weights."""
    how: PolicyOptions = field(default_factory=PolicyOptions)
    suite: Literal["libero_spatial", "libero_object"] = "libero_object"
    tasks: str = "all"
    """all, or indices such as 0-3,7."""
    states: str = "0-2"
    """Initial states such as 20-29."""
    json: bool = False
    """Print the episodes as JSON on stdout."""

    def run(self) -> int:
        import json
        from collections import Counter
        from dataclasses import asdict

        from mllm.policy import make_policy
        from sim.schedule import parse_numbers, parse_tasks
        from sim.swap import play_swaps

        policy = make_policy(self.policy, **self.how.chosen())
        tasks, states = parse_tasks(self.suite, self.tasks), parse_numbers(self.states, "--states")
        episodes = []
        for episode in play_swaps(policy, self.suite, tasks, states):
            episodes.append(episode)
            said = f"task {episode.task} state {episode.init_state}: told {episode.told}, usually {episode.usual}"
            sys.stderr.write(f"{said}; moved {', '.join(episode.moved) or 'nothing'}\n")
        went = Counter(episode.went for episode in episodes)
        if self.json:
            found = {"went": went, "episodes": [asdict(episode) for episode in episodes]}
            sys.stdout.write(json.dumps(found, indent=2) + "\n")
        else:
            counted = ", ".join(f"{role} {went[role]}" for role in ("told", "usual", "another", "none"))
            sys.stdout.write(f"of {len(episodes)} episodes: {counted}\n")
        return 0


@dataclass(frozen=True)
class PushObjects:
    """Move the object while the policy reuses an action, and see what becomes of it under each rule of reuse.

    The same episodes are disturbed in the same step under every rule. Says how many were solved, and after how many
    steps the model ran on what it saw.
    """

    policy: str = "mini"
    """Name of an installed policy, or a folder of weights."""
    how: PolicyOptions = field(default_factory=PolicyOptions)
    rules: tuple[str, ...] = ("off", "paper", "gated")
    """off, paper, gated, or JSON objects of settings; that of the first that is on finds the step."""
    suite: str = "libero_spatial"
    tasks: str = "all"
    """all, or indices such as 0-3,7."""
    states: str = "20-22"
    """Initial states such as 20-29."""
    distance: float = 0.04
    """m, along the table."""
    over: int = 1
    """Steps that the push takes; 1 is a jump."""
    near: float = 0.25
    """m between hand and object, within which it is pushed."""
    json: bool = False
    """Print the episodes as JSON on stdout."""

    def run(self) -> int:
        from flashvla_ros.push_table import show_pushes
        from sim.push import Push, play_pushes
        from sim.schedule import parse_numbers, parse_tasks

        options, push = self.how.chosen(), Push(self.distance, self.over, self.near)
        tasks, states = parse_tasks(self.suite, self.tasks), parse_numbers(self.states, "--states")
        show_pushes(play_pushes(self.policy, options, self.suite, tasks, states, self.rules, push), self.json)
        return 0


COMMANDS = {
    "push": PushObjects,
    "swap": SwapObjects,
    "eval": Eval,
    "merge": Merge,
    "compare": Compare,
    "report": Report,
}
