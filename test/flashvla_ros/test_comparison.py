"""A paired comparison as it is printed."""

from __future__ import annotations

import json

import pytest

from flashvla_ros.comparison import show_comparison
from sim.results import EpisodeKey
from sim.statistics import Change, Comparison

KEYS = [EpisodeKey("libero_goal", 0, state, 0) for state in range(3)]
COMPARISON = Comparison(
    n=40,
    successes=(30, 36),
    identical=7,
    only_a=(KEYS[0],),
    only_b=(KEYS[1],),
    errors={KEYS[2]: "A and B"},
    p_value=0.0312,
    success=Change(0.15, (0.025, 0.275)),
    latency=Change(-0.010, (-0.012, -0.008)),
    relative_latency=Change(-0.25, (-0.3, -0.2)),
    stages={
        "policy": (
            {"mean": 0.04, "p50": 0.039, "p99": 0.06, "n": 9},
            {"mean": 0.03, "p50": 0.029, "p99": 0.05, "n": 9},
        ),
        "gate": ({}, {}),
    },
    notes=("cpu: one in A, other in B",),
)


def test_tables_tell_success_latency_and_who_won_where(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    show_comparison(COMPARISON, ("a.sqlite", "b.sqlite"), json_output=False)
    text = capsys.readouterr().out
    for said in (
        "+15.0 points (+2.5 to +27.5)",
        "40.00, 39.00, 60.00",
        "-10.00 ms, -25.0 % (-30.0 to -20.0)",
        "p = 0.0312, of 40 pairs",
        "7 of 40",
        "solved by A alone: libero_goal task 0 state 0 seed 0",
        "left out, an error in A and B: libero_goal task 0 state 2 seed 0",
        "cpu: one in A, other in B",
    ):
        assert said in text


def test_json_is_the_same_in_plain_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    show_comparison(COMPARISON, ("a.sqlite", "b.sqlite"), json_output=True)
    result = json.loads(capsys.readouterr().out)
    assert result["success"] == {"value": 0.15, "interval": [0.025, 0.275]}
    assert result["only_b"] == [{"suite": "libero_goal", "task": 0, "init_state": 1, "seed": 0}]
    assert result["errors"][0]["in"] == "A and B"
    assert result["names"] == ["a.sqlite", "b.sqlite"]
