"""Intervals and paired tests against known values, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from sim.errors import ConfigurationError
from sim.results import EpisodeKey, EpisodeResult, RunFile
from sim.statistics import Side, bootstrap, compare_episodes, compare_runs, mcnemar, wilson

CONFIGURATION = {"policy": {"name": "a"}, "env": {"renderer": "fast"}, "versions": {"mujoco": "3.3.2"}}


def episode(number: int, outcome: str = "success", latency: float = 0.1, **provenance: str) -> EpisodeResult:
    return EpisodeResult(
        key=EpisodeKey("libero_goal", 0, number, 0),
        language="",
        outcome=outcome,
        steps=4,
        started="",
        finished="",
        actions=np.zeros((4, 7), np.float32),
        timing={"policy": np.full(4, latency)},
        provenance=provenance,
        error="Traceback" if outcome == "error" else None,
    )


def outcomes(text: str) -> list[EpisodeResult]:
    """One episode a letter: success, failure, error."""
    names = {"s": "success", "f": "failure", "e": "error"}
    return [episode(number, names[letter]) for number, letter in enumerate(text)]


def test_wilson_s_interval_is_the_textbook_s() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_mcnemar_s_test_is_the_binomial_s() -> None:
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(0, 0) == 1.0


def test_the_bootstrap_follows_its_seed_and_the_normal_interval() -> None:
    sample = np.random.default_rng(1).normal(size=400)
    one, again, other = (bootstrap(np.mean, [sample], 4000, seed) for seed in (0, 0, 1))
    assert one == again != other
    half = 1.96 * sample.std() / np.sqrt(sample.size)
    assert one == pytest.approx((sample.mean() - half, sample.mean() + half), abs=0.01)


def test_discordant_pairs_are_listed_and_errors_left_out_of_both_sides() -> None:
    comparison = compare_episodes(outcomes("ssffese"), outcomes("sfsfsee"))
    assert comparison.n == 4
    assert comparison.successes == (2, 2)
    assert [key.init_state for key in comparison.only_a] == [1]
    assert [key.init_state for key in comparison.only_b] == [2]
    assert {key.init_state: sides for key, sides in comparison.errors.items()} == {4: "A", 5: "B", 6: "A and B"}
    assert comparison.success.value == 0.0


def test_pairs_with_the_same_actions_are_counted() -> None:
    a = outcomes("sfs")
    moved = dataclasses.replace(a[0], actions=a[0].actions + np.float32(1e-7))
    assert compare_episodes(a, [moved, *outcomes("sff")[1:]]).identical == 1


def test_the_change_of_success_has_its_interval() -> None:
    comparison = compare_episodes(outcomes("s" * 60 + "f" * 40), outcomes("s" * 90 + "f" * 10))
    assert comparison.success.value == pytest.approx(0.3)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 100)
    assert comparison.success.interval == pytest.approx((0.3 - half, 0.3 + half), abs=0.02)
    assert comparison.p_value == pytest.approx(2 / 2**30)


def test_latency_is_compared_within_pairs() -> None:
    """Episodes differ a hundredfold and B takes half of A's time in each: paired, there is no doubt about it."""
    latencies = np.geomspace(0.01, 1.0, 20)
    a = [episode(number, latency=latency) for number, latency in enumerate(latencies)]
    b = [episode(number, latency=latency / 2) for number, latency in enumerate(latencies)]
    comparison = compare_episodes(a, b)
    assert comparison.relative_latency is not None
    assert comparison.relative_latency.value == pytest.approx(-0.5)
    assert comparison.relative_latency.interval == pytest.approx((-0.5, -0.5))
    assert comparison.latency is not None
    assert comparison.latency.value == pytest.approx(-latencies.mean() / 2)
    assert comparison.latency.interval[0] < comparison.latency.value < comparison.latency.interval[1] < 0
    assert comparison.stages["policy"][0]["n"] == 80


def test_circumstances_that_differ_are_noted() -> None:
    a = [episode(number, cpu="one", torch="2") for number in range(2)]
    b = [episode(number, cpu="other", torch="2") for number in range(2)]
    assert compare_episodes(a, b).notes == ("cpu: one in A, other in B",)


def test_other_episodes_are_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"A lacks 1, such as libero_goal task 0 state 2 seed 0\. Play"):
        compare_episodes(outcomes("ss"), outcomes("sss"))


def test_nothing_but_errors_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="0 pairs without an error, of 2"):
        compare_episodes(outcomes("es"), outcomes("fe"))


def store(path: Path, episodes: list[EpisodeResult], variant: str = "", **changes: dict) -> None:
    with RunFile(path, write=True) as run:
        run.configure(variant, {**CONFIGURATION, **changes})
        for one in episodes:
            run.add(dataclasses.replace(one, key=dataclasses.replace(one.key, variant=variant)))


def test_runs_in_different_simulations_are_refused_unless_that_is_the_question(tmp_path: Path) -> None:
    store(tmp_path / "a", outcomes("ssf"))
    store(tmp_path / "b", outcomes("sff"), env={"renderer": "official"}, policy={"name": "b"})
    a, b = Side.parse(str(tmp_path / "a")), Side.parse(str(tmp_path / "b"))
    with pytest.raises(ConfigurationError, match=r"env\.renderer was 'fast', is 'official'.*--across env\.renderer"):
        compare_runs(a, b)
    assert compare_runs(a, b, across=("env.renderer",)).successes == (2, 1)


def test_variants_of_one_file_are_compared_on_what_both_have(tmp_path: Path) -> None:
    path = tmp_path / "sweep"
    store(path, outcomes("ssf"), "none")
    store(path, outcomes("sfs"[:2]), "keep 80")
    comparison = compare_runs(Side.parse(f"{path}:none"), Side.parse(f"{path}:keep 80"), common=True)
    assert (comparison.n, comparison.successes) == (2, (2, 1))


@pytest.mark.parametrize("text", ["", ":fast"])
def test_a_variant_must_be_one_of_the_file_s(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sweep"
    store(path, outcomes("ss"), "none")
    store(path, outcomes("ss"), "keep 80")
    with pytest.raises(ConfigurationError, match="of: 'keep 80', 'none'"):
        Side.parse(f"{path}{text}")
