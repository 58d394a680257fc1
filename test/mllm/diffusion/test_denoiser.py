"""The denoiser, its training, and what makes its layers anomalous."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from mllm.diffusion.arms import ENDS, QuantiseConfig, Subject, draw, prepare  # noqa: E402
from mllm.diffusion.denoiser import Denoiser, DenoiserConfig, sinusoids  # noqa: E402
from mllm.diffusion.fit import FitConfig, fit  # noqa: E402
from mllm.diffusion.schedule import Schedule  # noqa: E402
from mllm.errors import PolicyError  # noqa: E402
from quant.calibration import calibrate  # noqa: E402

SMALL = DenoiserConfig(2, width=32, depth=2)


def test_times_are_told_by_sines_and_cosines():
    table = sinusoids(torch.tensor([0, 7, 999]), 9)
    assert table.shape == (3, 9)
    for row, time in enumerate((0, 7, 999)):
        for place in range(4):
            rate = 10_000 ** (-place / 4)
            assert float(table[row, place]) == pytest.approx(math.cos(time * rate), abs=1e-4)
            assert float(table[row, 4 + place]) == pytest.approx(math.sin(time * rate), abs=1e-4)
        assert float(table[row, 8]) == 0


def test_time_and_condition_change_the_answer():
    model = Denoiser(DenoiserConfig(3, width=16, depth=1, condition=4))
    x, times, condition = torch.randn(5, 3), torch.zeros(5), torch.randn(5, 4)
    answer = model(x, times, condition)
    assert answer.shape == (5, 3)
    assert not torch.equal(answer, model(x, times + 50, condition))
    assert not torch.equal(answer, model(x, times, -condition))
    with pytest.raises(PolicyError, match="condition"):
        model(x, times)


def test_layers_behind_silu_are_the_anomalous_ones_and_ends_keep_eight_bits():
    model, schedule = Denoiser(SMALL), Schedule(50, 5)
    noise = torch.randn(40, 2)
    inputs = calibrate(model, lambda: draw(lambda _: model, schedule, noise))
    behind = {name for name, given in inputs.items() if given.follows == "silu"}
    assert behind == {"time2", *(f"blocks.{i}.{name}" for i in range(2) for name in ("modulate", "fc2"))}
    grids = prepare(Subject(model, schedule, noise), {"msfp"}, QuantiseConfig()).grids["msfp"]
    bits = {
        name: {format.bits for format in grid.weight.formats} | {grid.inputs.format.bits}
        for name, grid in grids.items()
    }
    assert {name for name, found in bits.items() if found == {8}} == {"enter", "time1", "leave"}
    assert all(found == {4} for name, found in bits.items() if name not in ENDS)


def test_a_trained_model_draws_what_it_has_seen():
    corners = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).repeat(50, 1)
    schedule = Schedule(100, 10)
    model = fit(Denoiser(SMALL), corners, schedule, FitConfig(steps=300, batch=64, rate=5e-3, average=0.98))
    drawn = draw(lambda _: model, schedule, torch.randn(200, 2))
    away = torch.cdist(drawn, corners[:2]).min(1).values
    assert away.median() < 0.25
    assert 0.25 < (drawn[:, 0] > 0).float().mean() < 0.75


def test_a_seed_says_all_of_a_training():
    x, schedule = torch.randn(30, 2), Schedule(50, 5)
    weights = [
        fit(Denoiser(SMALL), x, schedule, FitConfig(steps=3, batch=8, seed=seed)).enter.weight for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
