"""The commands of evaluation."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from flashvla_ros.cli_options import PolicyOptions


@dataclass(frozen=True)
class Eval:
    """Evaluate a policy on LIBERO under OpenVLA's protocol, or go on with an evaluation that was stopped.

    Every episode is stored as it ends, as a success, a failure, or an error, which counts as neither. The same command
    plays what the run still lacks.
    """

    policy: str = "mini"
    """Name of an installed policy, or expert (the scripted one, which reads the simulator)."""
    how: PolicyOptions = field(default_factory=PolicyOptions)
    suite: tuple[str, ...] = ("libero_spatial",)
    """One or several suites."""
    tasks: str = "all"
    """all, indices such as 0-3,7, or one instruction."""
    trials: int = 50
    """Episodes a task, from --first-state on."""
    first_state: int = 0
    """First initial state."""
    states: str = ""
    """Initial states such as 20-49, in place of --trials and --first-state."""
    draw: Literal["", "sampled", "shuffled"] = ""
    """Draw fresh starts: the numbers are seeds instead of official initial states. sampled is LIBERO's way; shuffled
    objects of libero_object exchange places, and any of them may be asked for."""
    seed: int = 0
    """Places the fixtures, which official initial states leave open."""
    run_file: tyro.conf.Positional[Path | None] = None
    """File of the run (.sqlite), before any option; runs/POLICY.sqlite if not given."""
    variant: str = ""
    """Name of this configuration within the file, where it has several."""
    workers: int = 2
    """Environments at once, each a process."""
    executor: str = "process"
    """process (this machine) or ray (a Ray cluster)."""
    max_batch: int = 1
    """Observations that the policy answers in one call at most; more is faster on a GPU, and changes the last bits."""
    in_a_row: int = 5
    """Episodes of one task before a worker builds the next task's environment."""
    renderer: str | None = None
    """official or fast; what the policy was trained with if not given."""
    image_size: int | None = None
    """Pixels of each camera; what the policy was trained with if not given."""
    cameras: tuple[str, ...] | None = None
    """LIBERO's camera names; what the policy was trained with if not given."""
    stepper: str = "fast"
    """official or fast: the same states, bit for bit."""
    settle_steps: int = 10
    """Steps without motion before an episode."""
    step_limit: int | None = None
    """Steps before an episode is a failure; the suite's if not given."""
    through_ros: bool = False
    """Play each episode through the LIBERO graph in lockstep (nodes, messages, gate), one after the other."""
    record_failures: bool = False
    """Keep a video of every failure and error."""
    retry_errors: bool = False
    """Play episodes again that the run has as errors."""
    json: bool = False
    """Print the table as JSON on stdout; everything else goes to stderr."""

    def run(self) -> int:
        from flashvla_ros.errors import ConfigurationError
        from flashvla_ros.evaluation import run_evaluation
        from sim.evaluate import EvalConfig, Execution
        from sim.schedule import episode_keys, parse_numbers, parse_tasks

        if self.trials < 1 or self.first_state < 0:
            raise ConfigurationError(
                f"--trials is {self.trials}, --first-state {self.first_state}: at least 1, and at least 0"
            )
        states = range(self.first_state, self.first_state + self.trials)
        numbers = parse_numbers(self.states, "--states") if self.states else tuple(states)
        keys = [
            key
            for suite in self.suite
            for key in episode_keys(suite, parse_tasks(suite, self.tasks), numbers, self.seed, self.variant, self.draw)
        ]
        config = EvalConfig(
            policy=self.policy,
            options=self.how.chosen(),
            renderer=self.renderer,
            image_size=self.image_size,
            cameras=self.cameras,
            stepper=self.stepper,
            settle_steps=self.settle_steps,
            step_limit=self.step_limit,
        )
        execution = Execution(
            workers=self.workers,
            executor=self.executor,
            max_batch=self.max_batch,
            in_a_row=self.in_a_row,
            record_failures=self.record_failures,
            retry_errors=self.retry_errors,
        )
        path = self.run_file or Path("runs") / f"{self.policy}.sqlite"
        return run_evaluation(path, config, keys, execution, through_ros=self.through_ros, json_output=self.json)


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
    """Tell a policy another object's name in scenes of libero_object that hold both, and see to which one it goes."""

    policy: str = "mini"
    """Name of an installed policy."""
    how: PolicyOptions = field(default_factory=PolicyOptions)
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
        from sim.swap import SUITE, play_swaps

        policy = make_policy(self.policy, **self.how.chosen())
        tasks, states = parse_tasks(SUITE, self.tasks), parse_numbers(self.states, "--states")
        episodes = []
        for episode in play_swaps(policy, tasks, states):
            episodes.append(episode)
            said = f"task {episode.task} state {episode.init_state}: told {episode.told}, usually {episode.usual}"
            sys.stderr.write(f"{said}; lifted {', '.join(episode.carried) or 'nothing'}\n")
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
    """Name of an installed policy."""
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
