"""The variants of a run side by side: success beside what it costs, each against a reference on the same episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sim.results import EpisodeResult
from sim.statistics import Comparison, compare_episodes, flag_totals, pooled_stages, step_counts, wilson

REFERENCE = "none-off"  # the first arm of a sweep; see `mllm.sweep.Arm`


@dataclass(frozen=True)
class Standing:
    """One variant.

    n: episodes without an error.  rate: of success, None where n is 0, and its Wilson interval.
    latency: mean, p50, p99 of the policy in s over all steps; empty where there is none.
    reused: share of all steps.  flops, visual_flops: mean of a step, reuse included; weight_bytes: of the model; None
        where the policy tells none.
    against: the reference as A and this as B, on the episodes that both have; None of the reference itself, and where
        there are fewer than two pairs.
    """

    variant: str
    n: int
    successes: int
    errors: int
    rate: float | None
    interval: tuple[float, float]
    latency: Mapping[str, float]
    reused: float
    flops: float | None
    visual_flops: float | None
    weight_bytes: float | None
    against: Comparison | None


def standings(
    episodes: Mapping[str, Sequence[EpisodeResult]], reference: str = REFERENCE, resamples: int = 10_000
) -> list[Standing]:
    """One of each variant, the reference first where there is one. episodes: by variant."""
    order = sorted(episodes, key=lambda variant: variant != reference)
    return [_standing(variant, episodes, reference, resamples) for variant in order]


def _standing(
    variant: str, episodes: Mapping[str, Sequence[EpisodeResult]], reference: str, resamples: int
) -> Standing:
    own = episodes[variant]
    outcomes = [episode.outcome for episode in own]
    successes, errors = outcomes.count("success"), outcomes.count("error")
    n, steps = len(own) - errors, float(step_counts(own).sum())
    flops, visual = (float(flag_totals(own, flag).sum()) for flag in ("flops", "visual_flops"))
    against = None
    if variant != reference and reference in episodes:
        against = _compare(episodes[reference], own, resamples)
    return Standing(
        variant=variant,
        n=n,
        successes=successes,
        errors=errors,
        rate=successes / n if n else None,
        interval=wilson(successes, n),
        latency=pooled_stages(own).get("policy", {}),
        reused=float(flag_totals(own, "reuse").sum()) / steps if steps else 0.0,
        flops=flops / steps if flops else None,
        visual_flops=visual / steps if visual else None,
        weight_bytes=next((e.flags["weight_bytes"]["mean"] for e in own if "weight_bytes" in e.flags), None),
        against=against,
    )


def _compare(a: Sequence[EpisodeResult], b: Sequence[EpisodeResult], resamples: int) -> Comparison | None:
    sides: list[dict[Any, EpisodeResult]] = [{replace(e.key, variant=""): e for e in side} for side in (a, b)]
    both = [key for key in sides[0] if key in sides[1]]
    if sum(all(side[key].outcome != "error" for side in sides) for key in both) < 2:
        return None
    return compare_episodes([sides[0][key] for key in both], [sides[1][key] for key in both], resamples)
