"""Intervals and paired tests of evaluation results. The statistics themselves are statsmodels' and scipy's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sim.errors import ConfigurationError
from sim.results import EpisodeKey, EpisodeResult, RunFile, differences, summarise_seconds

# In an episode's provenance: what latency, or a last bit, may depend on, while success may still be compared.
CIRCUMSTANCES = (
    "cpu",
    "gl_renderer",
    "git_commit",
    "env_git_commit",
    "numpy",
    "python",
    "torch",
    "workers",
    "max_batch",
    "executor",
)


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate, (low, high); (0, 1) where nothing was tried."""
    from statsmodels.stats.proportion import proportion_confint

    if not n:
        return 0.0, 1.0
    low, high = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
    return float(low), float(high)


def percent(rate: float | None) -> str:
    """0.955 as "95.5 %"; nothing for None."""
    return "" if rate is None else f"{100 * rate:.1f} %"


def mcnemar(only_a: int, only_b: int) -> float:
    """p of McNemar's exact test, two-sided: that one side wins as many or more of the discordant pairs by chance."""
    from statsmodels.stats.contingency_tables import mcnemar as test

    return float(test([[0, only_a], [only_b, 0]], exact=True).pvalue)


def bootstrap(statistic: Any, samples: Sequence[np.ndarray], resamples: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of a statistic of paired samples, which are resampled together.

    statistic: takes each sample and `axis`, as `scipy.stats.bootstrap` calls it.  samples: each (n,), n >= 2.
    """
    from scipy import stats

    found = stats.bootstrap(
        samples,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, 10_000_000 // samples[0].size),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


@dataclass(frozen=True)
class Change:
    """B against A: `value` is the difference, and `interval` its 95 % interval by paired bootstrap over episodes."""

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """Two configurations on the same episodes.

    n: pairs of which neither side is an error.  successes: (A, B).
    identical: pairs with the same outcome after the same actions, to the bit.
    only_a, only_b: discordant pairs, solved by one side alone.  errors: keys -> which sides ended in an error.
    p_value: McNemar's exact test.  success: change of the rate, from -1 to 1.
    latency, relative_latency: change of the mean of the policy's s a step, in s and as a share of A's; None where a
        side has no step.
    stages: stage -> (A's, B's) mean, p50, p99 in s over all steps of the pairs; see `summarise_seconds`.
    relative_flops, relative_visual_flops: change of the operations a step, reuse included, as a share of A's; None
        where a side tells none.
    notes: circumstances that differ; latency may not be comparable.
    """

    n: int
    successes: tuple[int, int]
    identical: int
    only_a: tuple[EpisodeKey, ...]
    only_b: tuple[EpisodeKey, ...]
    errors: Mapping[EpisodeKey, str]
    p_value: float
    success: Change
    latency: Change | None
    relative_latency: Change | None
    stages: Mapping[str, tuple[dict[str, float], dict[str, float]]]
    notes: tuple[str, ...] = ()
    relative_flops: Change | None = None
    relative_visual_flops: Change | None = None


def _difference(seconds_a: Any, steps_a: Any, seconds_b: Any, steps_b: Any, axis: int = -1) -> Any:
    return seconds_b.sum(axis) / steps_b.sum(axis) - seconds_a.sum(axis) / steps_a.sum(axis)


def _ratio(seconds_a: Any, steps_a: Any, seconds_b: Any, steps_b: Any, axis: int = -1) -> Any:
    return seconds_b.sum(axis) / steps_b.sum(axis) / (seconds_a.sum(axis) / steps_a.sum(axis)) - 1


def compare_episodes(
    a: Iterable[EpisodeResult], b: Iterable[EpisodeResult], resamples: int = 10_000, seed: int = 0
) -> Comparison:
    """Compares episodes that have the same keys, the variant aside.

    Raises ConfigurationError: other keys on one side than on the other, or fewer than two pairs without an error.
    """
    mine, theirs = ({replace(episode.key, variant=""): episode for episode in side} for side in (a, b))
    if mine.keys() != theirs.keys():
        lacking = {"B": mine.keys() - theirs.keys(), "A": theirs.keys() - mine.keys()}
        said = [f"{side} lacks {len(keys)}, such as {min(keys, key=str)}" for side, keys in lacking.items() if keys]
        raise ConfigurationError(
            f"the runs are not paired, they have other episodes: {'; '.join(said)}. Play these, or use --common"
        )
    sides = {key: [mine[key].outcome == "error", theirs[key].outcome == "error"] for key in mine}
    errors = {
        key: " and ".join(name for name, is_error in zip("AB", found, strict=True) if is_error)
        for key, found in sides.items()
        if any(found)
    }
    keys = [key for key in mine if key not in errors]
    if len(keys) < 2:
        raise ConfigurationError(
            f"there are {len(keys)} pairs without an error, of {len(mine)}: a comparison needs at least 2"
        )
    solved = np.array([[side[key].outcome == "success" for key in keys] for side in (mine, theirs)])
    only = [
        [key for key, one, other in zip(keys, *pair, strict=True) if one and not other]
        for pair in (solved, solved[::-1])
    ]
    gains = solved[1].astype(float) - solved[0]
    pairs = [[side[key] for key in keys] for side in (mine, theirs)]
    samples = (*_totals(pairs[0]), *_totals(pairs[1]))

    def relative(samples: tuple[np.ndarray, ...]) -> Change | None:
        if not all(total.sum() > 0 for total in samples):
            return None
        a, a_steps, b, b_steps = samples
        return Change(float(_ratio(a, a_steps, b, b_steps)), bootstrap(_ratio, samples, resamples, seed))

    shares = [
        relative(tuple(total for side in pairs for total in (flag_totals(side, flag), step_counts(side))))
        for flag in ("flops", "visual_flops")
    ]
    return Comparison(
        n=len(keys),
        successes=(int(solved[0].sum()), int(solved[1].sum())),
        identical=sum(_identical(mine[key], theirs[key]) for key in keys),
        only_a=tuple(only[0]),
        only_b=tuple(only[1]),
        errors=errors,
        p_value=mcnemar(len(only[0]), len(only[1])),
        success=Change(float(gains.mean()), bootstrap(np.mean, [gains], resamples, seed)),
        latency=Change(float(_difference(*samples)), bootstrap(_difference, samples, resamples, seed))
        if all(total.sum() > 0 for total in samples)
        else None,
        relative_latency=relative(samples),
        stages=_stages(*pairs),
        notes=_notes(*pairs),
        relative_flops=shares[0],
        relative_visual_flops=shares[1],
    )


def _identical(a: EpisodeResult, b: EpisodeResult) -> bool:
    return a.outcome == b.outcome and np.array_equal(a.actions, b.actions)


def _totals(episodes: Iterable[EpisodeResult]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) s that the policy took in each episode, and (n,) steps."""
    policy = [episode.timing.get("policy", np.zeros(0)) for episode in episodes]
    return np.array([np.nansum(seconds) for seconds in policy]), np.array([float(seconds.size) for seconds in policy])


def flag_totals(episodes: Sequence[EpisodeResult], flag: str) -> np.ndarray:
    """(n,) sum of a number that was flagged, over the steps of each episode; 0 where none was."""
    found = [episode.flags.get(flag, {}) for episode in episodes]
    return np.array([summary.get("mean", 0.0) * summary.get("n", 0) for summary in found], float)


def step_counts(episodes: Sequence[EpisodeResult]) -> np.ndarray:
    """(n,) control steps."""
    return np.array([episode.steps for episode in episodes], float)


def pooled_stages(episodes: Sequence[EpisodeResult]) -> dict[str, dict[str, float]]:
    """Stage -> mean, p50, p99 in s over the steps of all episodes that had it, and how many these are."""
    names = dict.fromkeys(stage for episode in episodes for stage in episode.timing)
    pooled = {
        stage: np.concatenate([episode.timing[stage] for episode in episodes if stage in episode.timing])
        for stage in names
    }
    return {stage: summary for stage, seconds in pooled.items() if (summary := summarise_seconds(seconds))}


def _stages(
    a: Sequence[EpisodeResult], b: Sequence[EpisodeResult]
) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    mine, theirs = pooled_stages(a), pooled_stages(b)
    return {stage: (mine.get(stage, {}), theirs.get(stage, {})) for stage in {**mine, **theirs}}


def _notes(a: Sequence[EpisodeResult], b: Sequence[EpisodeResult]) -> tuple[str, ...]:
    notes = []
    for name in CIRCUMSTANCES:
        mine, theirs = (sorted({episode.provenance.get(name, "") for episode in side}) for side in (a, b))
        if mine != theirs:
            notes.append(f"{name}: {', '.join(mine)} in A, {', '.join(theirs)} in B")
    return tuple(notes)


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a run's file, and one variant in it."""

    path: Path
    variant: str

    @staticmethod
    def parse(text: str) -> Side:
        """Reads FILE or FILE:VARIANT. Raises ConfigurationError: no such file, no such variant, or none chosen."""
        path, variant = Path(text), None
        if not path.is_file() and ":" in text:
            head, _, variant = text.rpartition(":")
            path = Path(head)
        with RunFile(path) as run:
            known = list(run.configurations())
        if variant is None and len(known) == 1:
            return Side(path, known[0])
        if variant not in known:
            raise ConfigurationError(
                f"{path} has {'no variant ' + repr(variant) if variant is not None else 'several variants'}: choose "
                f"one as {path}:VARIANT, of: {', '.join(map(repr, known)) or 'none'}"
            )
        return Side(path, variant)


def compare_runs(
    a: Side, b: Side, across: Sequence[str] = (), common: bool = False, resamples: int = 10_000, seed: int = 0
) -> Comparison:
    """Compares two runs, or two variants of one, episode by episode.

    across: settings that may differ because they are what is compared, such as "env.renderer".
    common: take the episodes that both have; otherwise both must have the same.
    Raises ConfigurationError: the runs are not paired; the message says what differs.
    """
    found: list[list[EpisodeResult]] = []
    stored: list[dict[str, Any]] = []
    for side in (a, b):
        with RunFile(side.path) as run:
            stored.append(run.configurations()[side.variant])
            found.append(list(run.episodes(side.variant)))
    before, after = ({name: part for name, part in one.items() if name in ("env", "versions")} for one in stored)
    apart = [text for text in differences(before, after) if text.partition(" ")[0] not in across]
    if apart:
        names = ", ".join(text.partition(" ")[0] for text in apart)
        raise ConfigurationError(
            f"the runs are not paired, A and B differ: {'; '.join(apart)}. Where this is what you compare, "
            f"say --across {names}"
        )
    if common:
        keys = [{replace(episode.key, variant="") for episode in side} for side in found]
        both = keys[0] & keys[1]
        found = [[episode for episode in side if replace(episode.key, variant="") in both] for side in found]
    return compare_episodes(found[0], found[1], resamples, seed)
