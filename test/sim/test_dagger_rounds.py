"""A round of DAgger in the real simulator, with a model that knows nothing yet."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("torch")

from mllm.demonstrations import read_demonstration
from mllm.hf_config import load_config
from mllm.training.config import TrainConfig
from mllm.training.ship import history, read_history, ship
from mllm.training.trainer import Trainer
from sim.dagger_rounds import SEEDS_OF_ROUND, DaggerConfig, run_rounds
from sim.errors import ConfigurationError

CHANGE = {"decoding": "slots", "chunk": 8, "head": "regression", "execute": 8, "proprio": ["eef_pos"]}


def test_a_round_collects_with_the_last_policy_stops_when_asked_and_trains_on_both(tiny, demonstrations, tmp_path):
    first = TrainConfig(
        "run", (str(demonstrations),), init=str(tiny), change=CHANGE, steps=2, batch=4, validation=0.0, threads=1
    )
    config = DaggerConfig(("libero_spatial",), tasks=(0,), rounds=1, episodes=2, steps=2, weight=2.0, workers=1)
    played = []

    def note(progress):
        played.extend([progress] if progress.done else [])

    assert run_rounds(first, config, tmp_path, lambda line: None, note, lambda: bool(played)) is None
    (manifest,) = (tmp_path / "run" / "dagger").rglob("manifest.json")
    task = json.loads(manifest.read_text())["tasks"]["0"]
    assert (len(played), task["demonstrations"], task["errors"]) == (1, 1, {})
    assert not (tmp_path / "run-dagger-1").exists()
    last = run_rounds(first, config, tmp_path, lambda line: None, lambda progress: None)
    assert last == tmp_path / "run-dagger-1" / "checkpoint"
    demo, _ = map(read_demonstration, sorted((tmp_path / "run" / "dagger").rglob("seed_*.hdf5")))
    assert (demo.source, demo.seed) == ("dagger", SEEDS_OF_ROUND)
    assert demo.provenance["image_size"] == "32"
    assert run_rounds(first, config, tmp_path, lambda line: None, lambda progress: None) == last

    ship(last.parent, tmp_path / "shipped")
    runs = read_history(tmp_path / "shipped")
    assert [run["name"] for run in runs] == ["run", "run-dagger-1"]
    assert runs[1]["init"] == "run"
    assert {item["source"]: item["episodes"] for item in runs[1]["demonstrations"]} == {"expert": 6, "dagger": 2}
    assert str(tmp_path) not in json.dumps(runs)
    assert load_config(tmp_path / "shipped") == load_config(last)

    further = replace(first, name="further", init=str(tmp_path / "shipped"), change={}, steps=1)
    assert Trainer(further, tmp_path, lambda line: None).run()
    assert [run["name"] for run in history(tmp_path / "further")] == ["run", "run-dagger-1", "further"]
    assert history(tmp_path / "further")[-1]["init"] == "run-dagger-1"


def test_a_wrong_round_is_refused():
    with pytest.raises(ConfigurationError, match="episodes is 0"):
        DaggerConfig(("libero_spatial",), episodes=0)
    with pytest.raises(ConfigurationError, match="suites is empty"):
        DaggerConfig(())
