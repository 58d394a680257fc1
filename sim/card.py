"""A checkpoint's card: how it was trained, and how often it succeeds, from the files that say so."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from mllm.checkpoint import load_checkpoint
from mllm.digest import DIGEST, weights_digest
from mllm.hf_config import load_config
from mllm.training.ship import CURVES, read_history
from sim.errors import ConfigurationError
from sim.results import EpisodeResult, RunFile
from sim.statistics import Side, wilson

# What of a result's provenance a reader needs to get the same.
SHOWN = ("git_commit", "mujoco", "robosuite", "libero", "torch", "numpy", "python", "cpu", "renderer", "stepper")


def write_card(checkpoint: Path, results: Sequence[Side], ablations: Mapping[str, Side]) -> Path:
    """Writes README.md into the checkpoint's folder and returns its path.

    results: runs with this checkpoint as it is.  ablations: what was taken away -> such a run.
    Raises ConfigurationError: a run is empty, or was not played with the weights of this checkpoint.
    """
    config = load_config(checkpoint)
    check_weights(checkpoint, [*results, *ablations.values()])
    runs = read_history(checkpoint)
    played = [episodes(side) for side in results]
    states = {episode.key.init_state for found in played for episode in found}
    weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    lines = [
        f"# {checkpoint.name}",
        "",
        f"A vision-language-action policy of OpenVLA's architecture for LIBERO's Panda: {weights / 1e6:.1f} MB of "
        f"weights, cameras {', '.join(config.cameras)} at {config.image_size} pixels, "
        f"decoding '{config.decoding}' with head '{config.head}', {config.execute} of {config.chunk} actions carried "
        "out before it looks again.",
        "",
        "## Success in closed loop",
        "",
        f"Initial states {named(states)}, under OpenVLA's protocol. Intervals are Wilson's, at 95 %.",
        "",
        *[line for found in played for line in success_table(found)],
    ]
    if ablations:
        lines += ["## What it depends on", "", "| taken away | n | success | 95 % |", "|---|---|---|---|"]
        for name, side in ablations.items():
            found = episodes(side)
            for suite in sorted({episode.key.suite for episode in found}):
                own = [episode for episode in found if episode.key.suite == suite]
                lines.append(f"| {name}, {suite} | {row(own)} |")
        lines.append("")
    lines += ["## Training", ""]
    for run in runs:
        lines += run_lines(run)
    if (checkpoint / CURVES).is_file():
        lines += [f"![curves of the last run]({CURVES})", ""]
    facts = played[0][0].provenance
    lines += ["## Made with", "", *(f"- {name}: {facts[name]}" for name in SHOWN if facts.get(name)), ""]
    path = checkpoint / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def check_weights(checkpoint: Path, sides: Sequence[Side]) -> None:
    """Raises ConfigurationError where a run was played with other weights than the checkpoint's, or does not say."""
    here = weights_digest(load_checkpoint(checkpoint)[0])
    for side in sides:
        with RunFile(side.path) as run:
            played = run.configurations()[side.variant]["policy"].get("provenance", {}).get(DIGEST)
        if played != here:
            name = f"{side.path}:{side.variant}" if side.variant else str(side.path)
            other = f"was played with weights {played}" if played else "does not say with which weights it was played"
            raise ConfigurationError(
                f"{name} {other}, and {checkpoint} holds {here}: evaluate this checkpoint into another file"
            )


def episodes(side: Side) -> list[EpisodeResult]:
    with RunFile(side.path) as run:
        found = list(run.episodes(side.variant))
    if not found:
        raise ConfigurationError(f"{side.path} holds no episode: evaluate first")
    return found


def named(states: Set[int | str]) -> str:
    """Initial states in words, those that follow one another as a range: "0-2, 5, sampled"."""
    spans: list[list[int]] = []
    for state in sorted(state for state in states if isinstance(state, int)):
        if spans and state == spans[-1][-1] + 1:
            spans[-1].append(state)
        else:
            spans.append([state])
    names = [str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans]
    return ", ".join([*names, *sorted(state for state in states if isinstance(state, str))])


def success_table(found: Sequence[EpisodeResult]) -> list[str]:
    """A Markdown table of one run, a row a task."""
    tasks: dict[tuple[str, int, str], list[EpisodeResult]] = defaultdict(list)
    for episode in found:
        tasks[(episode.key.suite, episode.key.task, episode.language)].append(episode)
    lines = ["| task | n | success | 95 % |", "|---|---|---|---|"]
    lines += [f"| {suite} {task}: {words} | {row(own)} |" for (suite, task, words), own in sorted(tasks.items())]
    for suite in sorted({suite for suite, _, _ in tasks}):
        lines.append(f"| **{suite}** | {row([episode for episode in found if episode.key.suite == suite])} |")
    return [*lines, f"| **all** | {row(found)} |", ""]


def row(found: Sequence[EpisodeResult]) -> str:
    """n, success and interval; errors say nothing about the policy and are counted apart."""
    counted = [episode for episode in found if episode.outcome != "error"]
    wins = sum(episode.outcome == "success" for episode in counted)
    low, high = wilson(wins, len(counted)) if counted else (0.0, 1.0)
    errors = len(found) - len(counted)
    rate = f"{100 * wins / len(counted):.1f} %" if counted else "-"
    return f"{len(counted)}{f' (+{errors} errors)' if errors else ''} | {rate} | {100 * low:.0f} - {100 * high:.0f} %"


def run_lines(run: Mapping[str, Any]) -> list[str]:
    learned = ", ".join(
        f"{item['episodes']} episodes of {item['suite']} ({item['source']})" for item in run["demonstrations"]
    )
    started = f" from the weights of `{run['init']}`" if run["init"] else ""
    keys = ["batch", "seed", "muon_rate", "adamw_rate", "final_rate", "ema", "precision", "change", "phase_weights"]
    keys += ["pointing_weight", "thin_share"]
    settings = ", ".join(f"{key} {run[key]}" for key in keys if run.get(key) not in (None, "", {}))
    return [f"- `{run['name']}`: {run['step']} steps{started}, on {learned}; {settings}", ""]
