"""What is told of a checkpoint's training is what the run learned from, whatever its folders hold later."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

pytest.importorskip("torch")

from safetensors.torch import load_file, save_file

from mllm.demonstrations import read_demonstration, write_demonstration
from mllm.errors import PolicyError
from mllm.training.config import TrainConfig
from mllm.training.data import find_demonstrations, held_out
from mllm.training.ship import history
from mllm.training.state import read_facts
from mllm.training.trainer import Trainer


def test_a_history_tells_of_what_was_learned_from(settings, demonstrations, tmp_path):
    folder = shutil.copytree(demonstrations, tmp_path / "demos")
    demo = read_demonstration(folder / "seed_00000000.hdf5")
    write_demonstration(folder / "seed_00000040.hdf5", replace(demo, seed=40, outcome="failure"))
    link = tmp_path / "link"
    link.symlink_to(folder)
    settings |= {"data": [str(folder), str(folder), str(link)], "steps": 1, "validation": 0.5}
    assert Trainer(TrainConfig(**settings), tmp_path, lambda line: None).run()
    demos = [read_demonstration(path) for path in find_demonstrations([str(folder)])]
    kept = [demo.seed for demo in demos if not held_out(demo, 0.5)]
    assert 40 in kept
    assert len(kept) < len(demos)
    whole, cut = (
        {"suite": "libero_spatial", "source": source, "episodes": len(seeds), "seeds": [min(seeds), max(seeds)]}
        for source, seeds in (("expert", kept[:-1]), ("beginnings", [40]))
    )

    write_demonstration(folder / "seed_00000050.hdf5", replace(demo, seed=50))
    (run,) = history(tmp_path / "run")
    assert run["demonstrations"] == [cut, whole]
    shutil.rmtree(folder)
    after = replace(TrainConfig(**settings), name="after", init=str(tmp_path / "run" / "checkpoint"), change={})
    after = replace(after, data=(str(demonstrations),), validation=0.0)
    assert Trainer(after, tmp_path, lambda line: None).run()
    assert history(tmp_path / "after")[0]["demonstrations"] == [cut, whole]


def test_a_state_that_does_not_say_what_was_learned_from_is_an_error(settings, demonstrations, tmp_path):
    Trainer(TrainConfig(**settings), tmp_path, lambda line: None).run(1)
    path = tmp_path / "run" / "state.safetensors"
    facts = read_facts(path.parent)
    del facts["learned"]
    save_file(load_file(path), path, {"facts": json.dumps(facts)})
    with pytest.raises(PolicyError, match=r"run was trained before .*: train it again"):
        history(tmp_path / "run")
