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
from sim.results import EpisodeKey
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

    An episode under every arm, then the next one: the arms of a run that was stopped are comparable, and a machine that
    is slow for a while is so for all of them.  execution: `in_a_row` counts the episodes of each arm.
    Raises: see `sim.evaluate.evaluate`.
    """
    execution = execution or Execution()
    execution = replace(execution, in_a_row=min(4096, execution.in_a_row * len(arms)))
    configs = {arm.name: replace(config, options={**config.options, **arm.options}) for arm in arms}
    planned = [replace(key, variant=arm.name) for key in keys for arm in arms]
    return evaluate(path, configs, planned, execution, on_progress=on_progress)
