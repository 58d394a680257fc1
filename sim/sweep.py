"""A sweep: the same policy under many arms, on recorded observations and in closed loop on the same episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mllm.policy import make_policy
from mllm.sweep import Arm, Clip, deviation, replay
from sim.evaluate import EvalConfig, Execution, evaluate
from sim.ledger import Progress
from sim.results import EpisodeKey, RunFile
from sim.schedule import make_blocks
from sim.statistics import bootstrap


def open_loop(
    policy: str, options: dict[str, Any], arms: Sequence[Arm], clips: Sequence[Clip], resamples: int = 10_000
) -> Iterator[dict[str, Any]]:
    """What each of `arms` does on the clips, against the first of them on the same ones; as JSON can hold it.

    "error", "gripper", "agreement" (None unless the policy speaks in tokens): see `mllm.sweep.deviation`, as "mean" and
    95 % "interval" by bootstrap over clips, which resamples the same clips for every arm.  "clips": the error of each.
    "overlap": see `mllm.sweep.Replay`; "chance" is what it would be of sets drawn anew for each look.  "reused": share
    of the steps.  "flops": mean of a step, reuse included; "flops_share" and "visual_flops_share" are of the first's.
    """
    first = None
    for arm in arms:
        made = make_policy(policy, **{**options, **arm.options})
        done = replay(made, clips)
        first = first or done
        apart = deviation(first, done)
        layout, speaks = getattr(made, "layout", None), getattr(getattr(made, "config", None), "head", "") == "tokens"
        yield {
            "arm": arm.name,
            "options": arm.options,
            "error": _mean(apart["error"], resamples),
            "gripper": _mean(apart["gripper"], resamples),
            "agreement": _mean(apart["agreement"], resamples) if speaks else None,
            "overlap": _number(done.overlap[~np.isnan(done.overlap)]),
            "chance": arm.compress.keep / layout.tokens if layout and arm.compress.method != "none" else None,
            "reused": _number(done.reused),
            "flops": _number(done.flops),
            "flops_share": _number(done.flops, first.flops),
            "visual_flops_share": _number(done.visual_flops, first.visual_flops),
            "clips": apart["error"].tolist(),
        }


def _mean(values: np.ndarray, resamples: int) -> dict[str, Any]:
    return {"mean": float(values.mean()), "interval": bootstrap(np.mean, [values], resamples, seed=0)}


def _number(values: np.ndarray, of: np.ndarray | None = None) -> float | None:
    """The mean, or its share of another; None where there is nothing to take it of."""
    if not values.size or np.isnan(values).any():
        return None
    return float(values.mean() if of is None else values.mean() / of.mean())


def closed_loop(
    path: Path | str,
    config: EvalConfig,
    arms: Sequence[Arm],
    keys: Sequence[EpisodeKey],
    execution: Execution | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Progress:
    """Plays `keys` under every arm, which is a variant of the run at `path`; what the run has is not played again.

    A few episodes under every arm by turns, then the next few: the arms of a run that was stopped are comparable, and a
    machine that is slow for a while is so for all of them.  Raises: see `sim.evaluate.evaluate`.
    """
    execution = execution or Execution()
    planned = [replace(key, variant=arm.name) for arm in arms for key in keys]
    known = _outcomes(Path(path), execution.retry_errors)
    outcomes = {key: known[key] for key in planned if key in known}
    whole = Progress(planned, outcomes, before=len(outcomes))
    on_progress(whole)

    def show(part: Progress) -> None:
        if part.done > part.before:
            key = next(reversed(part.outcomes))
            whole.outcomes[key] = part.outcomes[key]
            on_progress(whole)

    for number, part in enumerate(make_blocks(keys, execution.in_a_row * execution.workers, workers=1)):
        for arm in arms:
            mine = [replace(key, variant=arm.name) for key in part]
            # The first block is asked for in any case: a configuration that has changed is refused there.
            if number == 0 or any(key not in whole.outcomes for key in mine):
                own = replace(config, options={**config.options, **arm.options})
                evaluate(path, own, mine, execution, on_progress=show)
    return whole


def _outcomes(path: Path, retry_errors: bool) -> dict[EpisodeKey, str]:
    if not path.is_file():
        return {}
    with RunFile(path) as run:
        return {key: outcome for key, outcome in run.outcomes().items() if not (retry_errors and outcome == "error")}
