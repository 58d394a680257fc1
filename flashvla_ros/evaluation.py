"""Runs an evaluation for the command line: shows how it stands, and prints the table at its end."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from flashvla_ros.eval_table import rows, show_table, shown
from sim.evaluate import EvalConfig, Execution, evaluate
from sim.results import EpisodeKey


def run_evaluation(
    path: Path, config: EvalConfig, keys: Sequence[EpisodeKey], execution: Execution, json_output: bool
) -> int:
    """Plays what the run at `path` lacks of `keys`. Returns the exit status: 1 where an episode is an error."""
    console = Console(stderr=json_output)
    title = f"{config.policy}: {path}"
    with warnings.catch_warnings(), shown(console, title) as show:
        warnings.showwarning = lambda message, *_: console.print(f"warning: {message}", style="yellow", markup=False)
        progress = evaluate(path, config, keys, execution, on_progress=show)
    show_table(console, progress, title)
    if json_output:
        sys.stdout.write(json.dumps({"run": str(path), "rows": rows(progress)}, indent=2) + "\n")
    return 1 if "error" in progress.outcomes.values() else 0
