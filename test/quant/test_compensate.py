"""Rounding that makes up for itself, against the textbook's column by column, and what it is for: the outputs."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from quant.compensate import BLOCK, Moments, compensate, observe, round_columns  # noqa: E402
from quant.convert import pack_weight  # noqa: E402
from quant.errors import QuantError  # noqa: E402
from quant.formats import FloatFormat, quantise  # noqa: E402
from quant.packed import Activation  # noqa: E402
from quant.search import search_weight, weight_candidates  # noqa: E402


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(count, size, seed=0):
    """Correlated, of different sizes, and not around zero."""
    return (
        normal(count, size // 2, seed=seed) @ normal(size // 2, size, seed=9) + normal(count, size, seed=seed + 1) + 0.5
    )


def moments(x, q=None):
    found = Moments(x.shape[-1], x.device)
    found.add(x, x if q is None else q)
    return found


def test_columns_are_rounded_as_optimal_brain_quantisation_does_it_one_at_a_time():
    size = BLOCK + 30
    weight, x = normal(7, size), inputs(500, size).double()
    second = x.T @ x / len(x) + 0.1 * torch.eye(size, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(second), upper=True)
    found = round_columns(weight, FloatFormat.parse("E1M6"), torch.ones(7), upper.float())  # whole numbers
    # Equations 2 and 3 of the paper, with the inverse of what is left brought up to date after every column.
    left, inverse, expected = weight.double(), torch.linalg.inv(second), torch.empty(7, size)
    for column in range(size):
        expected[:, column] = left[:, column].round()
        error = (left[:, column] - expected[:, column]) / inverse[column, column]
        left = left - error[:, None] * inverse[column]
        inverse = inverse - inverse[:, column, None] * inverse[column] / inverse[column, column]
    assert (found != expected).float().mean() < 0.01  # float32 against float64 at ties
    assert torch.equal(found[:, : BLOCK // 2], expected[:, : BLOCK // 2])


@pytest.mark.parametrize("family", ["msfp", "signed", "int"])
@pytest.mark.parametrize("biased", [False, True])
def test_outputs_for_other_inputs_are_nearer_than_with_the_nearest_numbers(family, biased):
    weight, bias = normal(40, 96) / 10, normal(40, seed=3) if biased else None
    grid, kept = search_weight(weight, weight_candidates(family, 4)), Activation(FloatFormat.parse("E1M6"), 0.3)
    x, fresh = inputs(3000, 96), inputs(1000, 96, seed=20)
    rounded, shifted = compensate(weight, bias, grid, moments(x, kept.quantise(x)))

    def error(weight_, bias_):
        return float((pack_weight(weight_, bias_, grid, kept)(fresh) - F.linear(fresh, weight, bias)).square().mean())

    assert error(rounded, shifted) < 0.5 * error(weight, bias)


def test_every_number_is_on_its_channels_grid():
    weight, x = normal(30, 50) ** 3, inputs(200, 50)
    grid = search_weight(weight, weight_candidates("msfp", 4))
    assert len(grid.formats) > 1
    rounded, bias = compensate(weight, None, grid, moments(x))
    assert bias is None
    for row, choice, scale in zip(rounded, grid.choice.tolist(), grid.scale, strict=True):
        torch.testing.assert_close(quantise(row, grid.formats[choice], scale), row)
    assert torch.equal(pack_weight(rounded, None, grid, None).weight(), rounded)


def test_inputs_that_tell_nothing_of_each_other_leave_the_nearest_numbers():
    weight = normal(20, 32)
    grid = search_weight(weight, weight_candidates("msfp", 4))
    rounded, _ = compensate(weight, None, grid, moments(torch.eye(32)))
    assert torch.equal(rounded, pack_weight(weight, None, grid, None).weight())


def test_a_bias_takes_the_mean_of_the_error_and_an_input_that_never_changes():
    weight, bias, x = normal(20, 32), normal(20, seed=1), inputs(500, 32)
    x[:, 3] = 7.0
    kept = Activation(FloatFormat.parse("E2M1"), 0.8)
    grid = search_weight(weight, weight_candidates("msfp", 4))
    packed = pack_weight(*compensate(weight, bias, grid, moments(x, kept.quantise(x))), grid, kept)
    error = packed(x) - F.linear(x, weight, bias)
    torch.testing.assert_close(error.mean(0), torch.zeros(20), rtol=0, atol=1e-4)


def test_moments_are_those_of_all_inputs_of_all_calls_with_the_grid_of_each_layer():
    model, kept = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), Activation(FloatFormat.parse("E2M1"), 0.1)
    batches = [normal(4, 7, 6), normal(3, 6, seed=1)]
    found = observe(model, lambda: [model(batch) for batch in batches], {"2": kept, "0": None})
    first = torch.cat([batch.flatten(0, -2) for batch in batches]).double()
    second = model[1](model[0](first.float())).double()
    for name, x, q in (("0", first, first), ("2", second, kept.quantise(second).double())):
        torch.testing.assert_close(found[name].square, q.T @ q, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close((found[name].given, found[name].kept), (x.sum(0), q.sum(0)), rtol=1e-4, atol=1e-5)
        assert found[name].count == 4 * 7 + 3
    assert not any(part._forward_pre_hooks for part in model)


@pytest.mark.parametrize("size", [0, 5])
def test_inputs_that_are_all_zero_leave_the_nearest_numbers(size):
    weight = normal(3, size)
    grid = search_weight(weight, weight_candidates("msfp", 4))
    rounded, bias = compensate(weight, torch.ones(3), grid, moments(torch.zeros(4, size)))
    assert torch.equal(rounded, pack_weight(weight, None, grid, None).weight())
    assert torch.equal(bias, torch.ones(3))


def test_what_cannot_be_made_up_for_is_an_error():
    weight = normal(3, 5)
    grid = search_weight(weight, weight_candidates("msfp", 4))
    with pytest.raises(QuantError, match="moments of 6 inputs are not of a weight of 5"):
        compensate(weight, None, grid, moments(normal(4, 6)))
    with pytest.raises(QuantError, match="not finite"):
        compensate(weight, None, grid, moments(torch.full((2, 5), torch.inf)))
    with pytest.raises(QuantError, match="not finite"):
        compensate(weight, None, grid, moments(torch.full((2, 5), torch.inf), torch.ones(2, 5)))
    with pytest.raises(QuantError, match="layer '0' did not run again"):
        observe(nn.Sequential(nn.Linear(2, 2)), lambda: None, {"0": None})
