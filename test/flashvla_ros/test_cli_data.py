"""`flashvla collect` and `flashvla export`: what is asked for wrongly is said before any work."""

from __future__ import annotations

import json

import pytest

from flashvla_ros.cli import main
from flashvla_ros.cli_data import Collect
from flashvla_ros.cli_eval import Eval
from mllm.demonstrations import write_demonstration


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "12"], "no task 12"),
        (["--images", "png"], "'png'"),
        (["--workers", "0"], "workers is 0"),
        (["--policy", "hold", "--policy-options", "[1]"], "--policy-options"),
        (["--policy", "hold", "--beta", "2"], "beta is 2"),
    ],
)
def test_a_collection_that_cannot_be_is_wrong_usage_and_writes_nothing(arguments, message, tmp_path, capsys):
    assert main(["collect", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_by_default_no_start_is_both_trained_on_and_evaluated(tmp_path):
    collected, played = Collect(tmp_path), Eval(draw="sampled").keys()
    trained_on = range(collected.seed, collected.seed + collected.episodes)
    assert not {key.seed for key in played} & set(trained_on)


def test_export_writes_a_dataset_and_says_how_much(make_demonstration, tmp_path, capsys):
    write_demonstration(tmp_path / "seed_00000000.hdf5", make_demonstration(phase_names=("a", "b", "c")))
    assert main(["export", str(tmp_path), str(tmp_path / "out"), "--format", "lerobot"]) == 0
    assert "1 episodes, 5 frames" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/meta/info.json").read_text())["total_frames"] == 5


def test_export_of_nothing_is_wrong_usage(tmp_path, capsys):
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "no demonstration" in capsys.readouterr().err


def test_a_threshold_is_calibrated_on_demonstrations(make_demonstration, tmp_path, capsys):
    write_demonstration(tmp_path / "seed_00000000.hdf5", make_demonstration(phase_names=("a", "b", "c")))
    assert main(["calibrate", str(tmp_path), "--quantile", "0.5"]) == 0
    assert "50 % of 3 frames of 1 episodes exceed it" in capsys.readouterr().out
    for wrong, message in (("--quantile 1", "quantile is 1.0"), ("--episodes 0", "--episodes is 0")):
        assert main(["calibrate", str(tmp_path), *wrong.split()]) == 2
        assert message in capsys.readouterr().err
