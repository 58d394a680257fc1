"""Runs an evaluation for the command line: shows how it stands, and prints the table at its end."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from flashvla_ros.errors import ConfigurationError
from flashvla_ros.eval_table import rows, show_table, shown
from mllm.policy import make_policy
from sim.evaluate import EXPERT, EvalConfig, Execution, evaluate
from sim.ledger import Ledger, Progress
from sim.results import EpisodeKey


def run_evaluation(
    path: Path,
    config: EvalConfig,
    keys: Sequence[EpisodeKey],
    execution: Execution,
    *,
    through_ros: bool,
    json_output: bool,
) -> int:
    """Plays what the run at `path` lacks of `keys`. Returns the exit status: 1 where an episode is an error."""
    console = Console(stderr=json_output)
    title = f"{config.policy}: {path}"
    with warnings.catch_warnings(), shown(console, title) as show:
        warnings.showwarning = lambda message, *_: console.print(f"warning: {message}", style="yellow", markup=False)
        play = evaluate_through_ros if through_ros else evaluate
        progress = play(path, config, keys, execution, on_progress=show)
    show_table(console, progress, title)
    if json_output:
        sys.stdout.write(json.dumps({"run": str(path), "rows": rows(progress)}, indent=2) + "\n")
    return 1 if "error" in progress.outcomes.values() else 0


def evaluate_through_ros(
    path: Path,
    config: EvalConfig,
    keys: Sequence[EpisodeKey],
    execution: Execution,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Progress:
    """`sim.evaluate.evaluate` with each episode played by the `libero` graph's nodes, one after the other.

    Raises ConfigurationError: the expert, whose eyes are in the simulator, or videos, which only rollouts keep.
    """
    from flashvla_ros.ros_player import play_through_ros
    from flashvla_ros.session import interruptible, ros_context

    if config.policy == EXPERT:
        raise ConfigurationError(
            "the expert reads the simulator, so it cannot act through ROS: leave --through-ros out"
        )
    if execution.record_failures:
        raise ConfigurationError("episodes through ROS are not recorded: leave --record-failures or --through-ros out")
    policy = make_policy(config.policy, **config.options)
    env = config.env(policy)
    configuration = {**config.facts(env, policy), "through": "ros"}
    del policy  # its node makes its own
    with contextlib.ExitStack() as stack:
        ledger = stack.enter_context(
            Ledger(
                path,
                {key.variant: configuration for key in keys},
                keys,
                execution.retry_errors,
                execution.error_limit,
                on_progress,
            )
        )
        stack.enter_context(interruptible())
        stack.enter_context(ros_context())
        for key in ledger.missing:
            ledger.store(play_through_ros(env, config.policy, config.options, key))
        return ledger.progress
