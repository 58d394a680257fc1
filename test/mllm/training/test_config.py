"""A run's configuration, and the course of its rates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import mllm.training  # noqa: E402
from mllm.errors import PolicyError  # noqa: E402
from mllm.training.config import TrainConfig, read_train_config  # noqa: E402
from mllm.training.optimiser import rate_share  # noqa: E402

CONFIGS = Path(mllm.training.__file__).parent / "configs"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a", "data"),
        ("name: a\ndata: [d]\nstep: 3", "unknown fields: step"),
        ("name: a/b\ndata: [d]", "must be a folder's name"),
        ("name: a\ndata: []", "one folder of demonstrations or more"),
        ("name: a\ndata: [d]\nsteps: 0", "steps is 0: it must be a whole number from 1"),
        ("name: a\ndata: [d]\nsteps: 2.5", "steps is 2.5: it must be a whole number"),
        ("name: a\ndata: [d]\nmuon_rate: .nan", "muon_rate is nan"),
        ("name: a\ndata: [d]\nmodel: giant", "model is 'giant': choose one of"),
        ("name: a\ndata: [d]\ndevice: tpu", "device is 'tpu'"),
        ("name: a\ndata: [d]\nfrozen: ['']", "it must be names of modules"),
        ("name: a\ndata: [d]\nphase_weights: {close: -1}", "'close' has -1"),
        ("- 1", "must be a mapping"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_wrong_configuration_is_an_error_naming_the_field(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=message) as caught:
        read_train_config(path)
    assert str(path) in str(caught.value)


def test_rates_rise_in_a_line_and_fall_by_half_a_cosine():
    config = TrainConfig("run", ("data",), steps=1100, warmup=100, final_rate=0.1)
    assert rate_share(0, config) == pytest.approx(0.01)
    assert rate_share(99, config) == pytest.approx(1.0)
    assert rate_share(600, config) == pytest.approx(0.55)
    assert rate_share(1100, config) == pytest.approx(0.1)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_configurations_are_valid(path):
    assert read_train_config(path).name == path.stem


def test_a_run_goes_on_in_the_precision_that_it_began_in():
    config = TrainConfig("run", ("data",))
    assert config.resolved().dtype in (torch.float32, torch.bfloat16)
    assert [config.resolved(began).precision for began in ("float32", "bfloat16")] == ["float32", "bfloat16"]
    assert replace(config, precision="float32").resolved("bfloat16").precision == "float32"
    assert replace(config, device="cuda").resolved().dtype is torch.bfloat16
