"""What calibration sees: every number, a fair and bounded sample, and what stands before a layer."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from quant.calibration import calibrate  # noqa: E402
from quant.errors import QuantError  # noqa: E402


class Gated(nn.Module):
    """A little of everything: functions as modules and as functions, a view between, a gate, and a layer unused."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.behind_module = nn.Sequential(nn.GELU(), nn.Linear(16, 16))
        self.behind_silu = nn.Linear(4, 4)
        self.gate, self.up, self.down = (nn.Linear(16, 16) for _ in range(3))
        self.behind_mish = nn.Linear(16, 1)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        hidden = self.behind_module(self.first(x))
        hidden = self.behind_silu(F.silu(hidden).unflatten(-1, (4, 4))).flatten(-2)
        hidden = self.down(F.silu(self.gate(hidden)) * self.up(hidden))
        return self.behind_mish(F.mish(hidden))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Gated()


def test_functions_before_a_layer_are_found_through_modules_and_views_but_not_through_a_gate(model):
    seen = calibrate(model, lambda: model(torch.randn(5, 8)))
    assert {name: one.follows for name, one in seen.items()} == {
        "first": "",
        "behind_module.1": "gelu",
        "behind_silu": "silu",
        "gate": "",
        "up": "",
        "down": "",
        "behind_mish": "mish",
    }


def test_layers_come_in_the_order_of_their_calls_and_unused_ones_not_at_all(model):
    with torch.inference_mode():
        seen = calibrate(model, lambda: model(torch.randn(5, 8)))
    assert list(seen) == ["first", "behind_module.1", "behind_silu", "gate", "up", "down", "behind_mish"]


def test_statistics_are_of_all_numbers_of_all_calls():
    layer = nn.Linear(6, 2)
    batches = [torch.randn(n, 6) ** 2 for n in (3, 1, 70)]
    (one,) = calibrate(layer, lambda: [layer(batch) for batch in batches], size=10).values()
    x = torch.cat(batches).double()
    assert one.count == x.numel()
    assert (one.minimum, one.maximum) == (float(x.min()), float(x.max()))
    assert one.mean == pytest.approx(float(x.mean()))
    assert one.deviation == pytest.approx(float(x.std(correction=0)))
    assert one.skew == pytest.approx(float(((x - x.mean()) ** 3).mean() / x.std(correction=0) ** 3))


def test_the_sample_is_bounded_and_even_over_all_calls():
    layer = nn.Linear(100, 1)
    # Each number says when it came.
    batches = [torch.arange(start, start + 2000.0).view(20, 100) for start in range(0, 100_000, 2000)]
    (one,) = calibrate(layer, lambda: [layer(batch) for batch in batches], size=4000).values()
    assert len(one.sample) == 4000 == len(one.sample.unique())
    counts = torch.histc(one.sample, 10, 0, 100_000)
    # Of 4000 draws a tenth part has a spread of 19.
    assert bool(((counts - 400).abs() < 5 * 19).all())


def test_a_small_stream_is_kept_whole():
    layer = nn.Linear(5, 1)
    x = torch.randn(9, 5)
    (one,) = calibrate(layer, lambda: [layer(row) for row in x], size=1000).values()
    assert torch.equal(one.sample.sort().values, x.flatten().sort().values)


def test_the_same_seed_draws_the_same_sample():
    layer, x = nn.Linear(50, 1), torch.randn(100, 50)
    drawn = [next(iter(calibrate(layer, lambda: layer(x), 64, seed).values())).sample for seed in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("function", ["gelu", "silu", "mish"])
def test_what_such_a_function_makes_is_told_by_its_statistics_too(function):
    layer = nn.Linear(64, 1)
    made = getattr(F, function)(torch.randn(200, 64)).clone()
    (one,) = calibrate(layer, lambda: layer(made)).values()
    assert not one.follows
    assert one.bounded
    assert one.anomalous


def test_normal_and_one_sided_inputs_are_not_anomalous():
    layer = nn.Linear(64, 1)
    for x in (torch.randn(200, 64) * 0.05, torch.rand(200, 64), torch.randn(200, 64).exp() - 2):
        (one,) = calibrate(layer, lambda x=x: layer(x)).values()
        assert not one.anomalous


def test_the_model_is_left_as_it_was(model):
    before = model(torch.ones(1, 8))
    calibrate(model, lambda: model(torch.randn(5, 8)))
    assert torch.equal(model(torch.ones(1, 8)), before)
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_inputs_that_are_not_finite_are_an_error_that_names_the_layer(model):
    x = torch.randn(5, 8)
    x[0, 0] = torch.nan
    with pytest.raises(QuantError, match="1 of the 40 inputs of layer 'first'"):
        calibrate(model, lambda: model(x))
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_a_run_that_calls_no_layer_is_an_error(model):
    with pytest.raises(QuantError, match="no linear layer ran"):
        calibrate(model, lambda: None)
