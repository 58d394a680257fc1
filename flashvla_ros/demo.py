"""The main job: one LIBERO episode through real ROS 2 processes, shown, timed and recorded."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flashvla_ros.monitor import EpisodeMonitor, percentiles
from flashvla_ros.ros_player import graph_overrides
from flashvla_ros.session import Session, interruptible, ros_context, run_episode
from mllm.policy import make_policy
from mllm.recording import load_recording
from sim.evaluate import EvalConfig
from sim.results import EpisodeKey
from sim.tasks import STEP_LIMITS, find_task

STAGES = {
    "physics": "simulator: physics",
    "render": "simulator: two cameras",
    "policy": "policy",
    "gate": "command gate",
    "transport": "ROS 2 transport",
    "step": "whole step",
}


@dataclass(frozen=True)
class Act:
    """What a demo shows. steps: expected, or at most.  line: what is said about it first.

    overrides: node -> parameters of the `libero` graph.
    """

    overrides: Mapping[str, Mapping[str, Any]]
    steps: int
    line: str


def replayed(episode: Path) -> Act:
    """A recorded episode, played back without looking. Raises PolicyError: the file cannot be read."""
    recording = load_recording(episode)
    facts = recording.metadata
    bridge = {key: facts[key] for key in ("suite", "task", "init_state", "renderer", "stepper") if key in facts}
    options = json.dumps({"episode": str(episode), "after_end": "hold"})
    return Act(
        {
            "sim_bridge": {**bridge, "seed": int(facts.get("seed", 0))},
            "policy": {"policy": "replay", "policy_options": options},
        },
        len(recording.actions),
        f"{facts.get('suite')} task {facts.get('task')}: {facts.get('instruction', '')} (a recording)",
    )


def driven(policy: str, options: Mapping[str, Any], suite: str, task: int | str, init_state: int) -> Act:
    """A policy that sees the cameras, and images as it wants them. policy, options: see `mllm.policy.make_policy`.

    Raises PolicyError or ConfigurationError: no such policy, suite, task or initial state.
    """
    env = EvalConfig(policy, options).env(make_policy(policy, **options))
    found = find_task(suite, task)
    key = EpisodeKey(suite, found.index, init_state, env.seed)
    overrides = graph_overrides(env, policy, options, key)
    return Act(overrides, STEP_LIMITS[suite], f"{suite} task {found.index}: {found.language}")


def run_demo(
    act: Act,
    *,
    realtime: bool,
    runs: Path,
    json_output: bool,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> int:
    """Plays one episode through the `libero` graph. Returns the exit status: 0 for success."""
    console = Console(stderr=json_output)
    folder = runs / f"demo-{datetime.now():%Y%m%d-%H%M%S-%f}"
    bridge = {"mode": "realtime" if realtime else "lockstep", "trace_file": str(folder / "trace.npz")}
    wanted = {**act.overrides, "sim_bridge": {**act.overrides["sim_bridge"], **bridge}}
    for node, parameters in (overrides or {}).items():
        wanted[node] = {**wanted.get(node, {}), **parameters}
    console.print(act.line, style="bold", markup=False)
    with interruptible(), ros_context(), _progress(console) as progress:
        bar = progress.add_task("starting the nodes", total=act.steps)

        def show(monitor: EpisodeMonitor) -> None:
            steps = monitor.stepped()
            progress.update(bar, completed=steps, description="episode" if steps else "starting the nodes")

        session = run_episode(wanted, record_to=folder, on_progress=show)
    return report(session, folder, console, json_output)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        console=console,
    )


def report(session: Session, folder: Path, console: Console, json_output: bool) -> int:
    """Prints how it ended and where the time went; writes the same to `folder`/result.json."""
    outcome, recorder = session.outcome(), session.recorder
    stages = {name: percentiles(ms) for name, ms in session.monitor.table().items()}
    result = {
        "outcome": outcome.outcome,
        "steps": session.monitor.stepped(),
        "milliseconds": stages,
        "facts": dict(outcome.facts),
    }
    table = Table("stage", "p50 ms", "p99 ms", "max ms", title=f"{result['steps']} steps")
    labels = STAGES | {"transport": "waiting for the period"} if outcome.facts.get("mode") == "realtime" else STAGES
    for name, values in stages.items():
        table.add_row(labels[name], *(f"{values[key]:.2f}" for key in ("p50", "p99", "max")))
    if result["steps"]:
        console.print(table)
    if outcome.facts.get("error"):
        console.print(outcome.facts["error"], style="red", markup=False)
    failed_recording = recorder is not None and recorder.error is not None
    if recorder is not None and recorder.error is not None:
        console.print(str(recorder.error), style="red", markup=False)
    else:
        result["files"] = {
            "video": str(folder / "cameras.mp4"),
            "bag": str(folder / "bag"),
            "trace": str(folder / "trace.npz"),
        }
        console.print(f"video {folder / 'cameras.mp4'}\nbag   {folder / 'bag'}")
    style = {"success": "bold green", "failure": "bold yellow"}.get(outcome.outcome, "bold red")
    console.print(outcome.outcome.upper(), style=style)
    text = json.dumps(result, indent=2)
    if not failed_recording:
        (folder / "result.json").write_text(text + "\n")
    if json_output:
        sys.stdout.write(text + "\n")
    return 0 if outcome.outcome == "success" and not failed_recording else 1
