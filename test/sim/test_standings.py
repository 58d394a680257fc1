"""Variants side by side, on a case worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sim.report_plots import LABEL, Point, front, label_offsets, short_names
from sim.results import EpisodeKey, EpisodeResult
from sim.standings import standings

MADE = EpisodeResult(
    key=EpisodeKey("libero_goal", 0, 0, 0),
    language="",
    outcome="success",
    steps=4,
    started="",
    finished="",
    actions=np.zeros((4, 7), np.float32),
    timing={},
)


def episodes(variant: str, letters: str, seconds: float, looks: int, flops: float) -> list[EpisodeResult]:
    """One of four steps for each letter: success, failure, error. The policy looks in so many steps of each."""
    names = {"s": "success", "f": "failure", "e": "error"}
    return [
        replace(
            MADE,
            key=EpisodeKey("libero_goal", 0, state, 0, variant),
            outcome=names[letter],
            timing={"policy": np.full(4, seconds)},
            flags={
                "flops": {"mean": flops, "n": looks},
                "weight_bytes": {"mean": 5.0, "n": looks},
                "reuse": {"mean": 1 - looks / 4, "n": 4},
            },
            error="Traceback" if letter == "e" else None,
        )
        for state, letter in enumerate(letters)
    ]


RUN = {
    "fastv-80-off": episodes("fastv-80-off", "sffsfe", 0.010, 4, 80.0),
    "none-off": episodes("none-off", "sssfss", 0.020, 4, 100.0),
    "random-80-gated": episodes("random-80-gated", "ss", 0.005, 3, 80.0),
}


def test_each_variant_stands_beside_the_reference_on_the_episodes_that_both_have() -> None:
    first, fastv, reused = standings(RUN, resamples=200)
    assert [one.variant for one in (first, fastv, reused)] == ["none-off", "fastv-80-off", "random-80-gated"]
    assert (first.against, first.rate, first.flops, first.reused) == (None, 5 / 6, 100.0, 0.0)
    assert first.weight_bytes == 5.0
    assert (fastv.n, fastv.successes, fastv.errors, fastv.rate) == (5, 2, 1, 0.4)
    assert fastv.latency["mean"] == pytest.approx(0.010)
    assert fastv.against is not None
    assert reused.against is not None
    # s s s f s against s f f s f: three lost, one won.
    assert (fastv.against.n, len(fastv.against.only_a), len(fastv.against.only_b)) == (5, 3, 1)
    assert fastv.against.p_value == pytest.approx(2 * (1 + 4) / 2**4)
    assert fastv.against.success.value == pytest.approx(-0.4)
    assert fastv.against.relative_latency is not None
    assert fastv.against.relative_latency.value == pytest.approx(-0.5)
    assert fastv.against.relative_flops is not None
    assert fastv.against.relative_flops.value == pytest.approx(-0.2)
    assert reused.against.n == 2


def test_a_step_without_a_look_costs_nothing() -> None:
    *_, reused = standings(RUN, resamples=200)
    assert (reused.flops, reused.reused) == (pytest.approx(80 * 3 / 4), 0.25)
    assert reused.against is not None
    assert reused.against.relative_flops is not None
    assert reused.against.relative_flops.value == pytest.approx(60 / 100 - 1)


def test_without_the_reference_nothing_is_compared() -> None:
    assert [one.against for one in standings({"a": RUN["none-off"], "b": RUN["fastv-80-off"]})] == [None, None]


def test_the_front_is_what_no_other_beats_in_both() -> None:
    rates = {"dear": (3.0, 0.9), "beaten": (2.0, 0.6), "cheap": (1.0, 0.7), "as good and dearer": (4.0, 0.9)}
    points = [Point(name, rate, (0, 1), cost) for name, (cost, rate) in rates.items()]
    assert [point.name for point in front(points)] == ["cheap", "dear"]


def test_a_picture_s_names_have_the_settings_that_tell_variants_apart() -> None:
    gated = "flashvla-16-layer=1-trim=false-gated-min_overlap=0"
    assert short_names(["none-off", "fastv-16-layer=1-off", gated, f"{gated}-max_consecutive=2"]) == [
        "none-off",
        "fastv-16-off",
        "flashvla-16-gated",
        "flashvla-16-gated-max_consecutive=2",
    ]
    keeps = ["flashvla-16-energy=1e-05-off", "flashvla-16-energy=0.5-off", "flashvla-80-energy=0.5-off"]
    assert short_names(keeps) == keeps


def test_names_of_points_that_lie_close_hide_neither_each_other_nor_a_point() -> None:
    places = [(100.0 + 3 * number, 100.0) for number in range(12)]
    offsets = label_offsets(["flashvla-80-gated"] * 12, places)
    corners = np.array(places) + offsets
    width = 0.62 * LABEL * len("flashvla-80-gated")
    for number, (x, y) in enumerate(corners):
        others = np.delete(corners, number, axis=0)
        assert not ((np.abs(others[:, 0] - x) < width) & (np.abs(others[:, 1] - y) < LABEL)).any()
        assert not any(x < a + 4 and a - 4 < x + width and y < b + 4 and b - 4 < y + LABEL for a, b in places)
