"""A card says what the files say."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

pytest.importorskip("torch")

from mllm.checkpoint import load_checkpoint, write_json
from mllm.digest import DIGEST, weights_digest
from sim.card import named, write_card
from sim.errors import ConfigurationError
from sim.results import EpisodeKey, EpisodeResult, RunFile
from sim.statistics import Side, wilson


@pytest.fixture(scope="module")
def said(tiny):
    """What runs with `tiny` say of their policy."""
    return {"name": "mini", "provenance": {DIGEST: weights_digest(load_checkpoint(tiny)[0])}}


def run_of(path, outcomes, said, variant=""):
    with RunFile(path, write=True) as run:
        run.configure(variant, {"policy": said})
        for state, outcome in enumerate(outcomes):
            run.add(
                EpisodeResult(
                    key=EpisodeKey("libero_spatial", state % 2, state, 0, variant),
                    language="put the bowl somewhere",
                    outcome=outcome,
                    steps=3,
                    started="2020-01-01T00:00:00+00:00",
                    finished="2020-01-01T00:00:01+00:00",
                    actions=np.zeros((3, 7), np.float32),
                    timing={"policy": np.full(3, 0.01)},
                    provenance={"mujoco": "3.3.2", "git_commit": "abc"},
                    error="a traceback" if outcome == "error" else None,
                )
            )
    return Side(path, variant)


def test_the_states_that_were_played_are_named_as_ranges():
    assert named({3, 0, 2, 9, "sampled", 7, 8, 5}) == "0, 2-3, 5, 7-9, sampled"


def test_a_card_gives_success_per_task_and_counts_errors_apart(tiny, said, tmp_path):
    tiny = shutil.copytree(tiny, tmp_path / "checkpoint")
    write_json(
        tiny / "training.json",
        {
            "runs": [
                {
                    "name": "run",
                    "init": "",
                    "step": 7,
                    "demonstrations": [{"suite": "libero_spatial", "source": "expert", "episodes": 540}],
                    "batch": 16,
                    "seed": 0,
                }
            ]
        },
    )
    results = run_of(tmp_path / "main.sqlite", ["success", "success", "failure", "success", "error", "success"], said)
    run_of(tmp_path / "main.sqlite", ["failure"] * 6, {"name": "hold"}, "another arm of the same file")
    blind = run_of(tmp_path / "blind.sqlite", ["failure"] * 4, said)
    text = write_card(tiny, [results], {"sight": blind}).read_text()
    low, high = (round(100 * bound) for bound in wilson(4, 5))
    assert f"| **all** | 5 (+1 errors) | 80.0 % | {low} - {high} % |" in text
    assert "| **libero_spatial** | 5 (+1 errors) | 80.0 %" in text
    assert "| libero_spatial 0: put the bowl somewhere | 2 (+1 errors) | 50.0 %" in text
    assert "| sight, libero_spatial | 4 | 0.0 %" in text
    assert "Initial states 0-5, under" in text
    assert "`run`: 7 steps, on 540 episodes of libero_spatial (expert)" in text
    assert "- mujoco: 3.3.2" in text


def test_a_card_without_episodes_is_refused(tiny, said, tmp_path):
    with pytest.raises(ConfigurationError, match="holds no episode"):
        write_card(tiny, [run_of(tmp_path / "empty.sqlite", [], said)], {})


def test_a_card_of_other_weights_or_of_unknown_ones_is_refused(tiny, said, tmp_path):
    own = run_of(tmp_path / "own.sqlite", ["success"], said)
    here = said["provenance"][DIGEST]
    other = run_of(tmp_path / "other.sqlite", ["success"], {"name": "mini", "provenance": {DIGEST: "abc"}}, "arm")
    with pytest.raises(ConfigurationError, match=rf"other.sqlite:arm was played with weights abc, .* holds {here}"):
        write_card(tiny, [own, other], {})
    old = run_of(tmp_path / "old.sqlite", ["success"], {"name": "mini"})
    with pytest.raises(ConfigurationError, match=r"old\.sqlite does not say with which weights"):
        write_card(tiny, [own], {"sight": old})
    assert not (tiny / "README.md").exists()
