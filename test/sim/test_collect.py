"""The command as a whole: stopped by force in the middle, it goes on and ends with the same files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mllm.demonstrations import demonstration_files, read_demonstration
from sim.collect import CollectConfig, collect
from sim.dagger import PolicyMix
from sim.errors import ConfigurationError

CONFIG = CollectConfig(
    suite="libero_object", tasks=(0,), episodes=3, seed=70, image_size=32, images="webp", turn=2, cut=12
)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in demonstration_files(root)}


def test_a_collection_that_was_killed_goes_on_and_ends_with_the_same_files(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    end = collect(CONFIG, whole, workers=1)
    assert (end.total, end.before, end.done, end.cut, end.errors, end.frames) == (3, 0, 3, 3, 0, 36)

    code = f"""
from pathlib import Path
from sim.collect import CollectConfig, collect
collect({CONFIG!r}, Path({str(killed)!r}), 1, lambda state: print(state.done, flush=True))
"""
    code = "from sim.collect import *; from sim.executor import Noise\n" + code
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        assert process.stdout.readline() == "1\n"
        process.send_signal(signal.SIGKILL)
    assert len(contents(killed)) >= 1

    states = []
    end = collect(CONFIG, killed, workers=1, progress=states.append)
    assert end.before == states[0].done >= 1
    assert end.done == 3
    assert contents(killed) == contents(whole)
    for root in (whole, killed):
        task = json.loads((root / "libero_object" / "manifest.json").read_text())["tasks"]["0"]
        assert (task["demonstrations"], task["failures"], task["errors"]) == (3, {}, {})
    assert collect(CONFIG, killed).before == 3


def test_cut_episodes_are_kept_and_ask_for_what_their_seed_draws(tmp_path):
    config = replace(CONFIG, draw="shuffled", episodes=4, cut=3)
    end = collect(config, tmp_path, workers=1)
    assert (end.done, end.cut, end.successes, end.failures, end.frames) == (4, 4, 0, 0, 12)
    demos = [read_demonstration(path) for path in demonstration_files(tmp_path)]
    assert [len(demo.actions) for demo in demos] == [3] * 4
    assert len({demo.instruction for demo in demos}) > 1
    assert collect(config, tmp_path).before == 4
    with pytest.raises(ConfigurationError, match="cut is 0: it must be at least 1"):
        replace(config, cut=0)


def test_a_collection_with_a_policy_is_not_gone_on_with_by_other_weights(tiny, tmp_path):
    pytest.importorskip("torch")
    from mllm.checkpoint import load_checkpoint, save_checkpoint
    from mllm.vla import init_random

    policy, out = shutil.copytree(tiny, tmp_path / "policy"), tmp_path / "out"
    config = replace(CONFIG, episodes=1, cut=2, policy=PolicyMix(str(policy), beta=0.0))
    assert collect(config, out, workers=1).cut == 1
    model, tokenizer = load_checkpoint(policy)
    save_checkpoint(policy, init_random(model, 1), tokenizer)
    with pytest.raises(ConfigurationError, match=r"collected with policy_provenance {'weights_sha256'"):
        collect(replace(config, episodes=2), out, workers=1)
