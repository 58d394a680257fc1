"""The search against trying every candidate by fake quantisation, and what the paper says it finds."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from quant.errors import QuantError  # noqa: E402
from quant.formats import FloatFormat, integers, quantise  # noqa: E402
from quant.search import (  # noqa: E402
    SIGNED,
    UNSIGNED,
    Candidates,
    SortedRows,
    input_candidates,
    search_input,
    search_weight,
    weight_candidates,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tried(x, format, scale, zero=None):
    return float((quantise(x, format, scale, zero).double() - x.double()).square().sum())


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_error_of_every_candidate_is_that_of_fake_quantisation(bits):
    x = normal(3, 200)
    scales = torch.tensor([[0.02, 0.3, 1e-3]] * 3)
    for name in (*SIGNED[bits], *UNSIGNED[bits]):
        format = FloatFormat.parse(name)
        zero = None if format.signed else torch.full_like(scales, -0.4)
        rows = SortedRows(x.abs() if format.signed else x)
        grid = integers(format)[: format.codes // 2] if format.signed else integers(format)
        errors = rows.errors(grid, scales, zero)
        for row in range(3):
            for column in range(3):
                place = None if zero is None else zero[row, column]
                expected = tried(x[row], format, scales[row, column], place)
                assert float(errors[row, column]) == pytest.approx(expected, rel=1e-5)


def test_each_channel_has_the_format_and_range_that_trying_them_all_finds():
    weight = torch.cat((normal(4, 64), normal(4, 64, seed=1) ** 3, torch.rand(4, 64) - 0.5))
    candidates = weight_candidates("msfp", 4)
    found = search_weight(weight, candidates)
    for channel, row in enumerate(weight):
        errors = [
            tried(row, format, format.scale(row.abs().max().double() * factor))
            for format in candidates.signed
            for factor in candidates.signed_factors
        ]
        format = found.formats[int(found.choice[channel])]
        assert tried(row, format, found.scale[channel]) == pytest.approx(min(errors), rel=1e-5)
        assert float(found.error[channel]) == pytest.approx(min(errors), rel=1e-5)
    assert found.nmse == pytest.approx(float(found.error.sum() / weight.double().square().sum()))


def test_channels_of_a_weight_differ_in_format_where_their_distributions_do():
    weight = torch.cat((torch.rand(20, 256) - 0.5, normal(20, 256).sign() * 2 ** (6 * torch.rand(20, 256)).round()))
    found = search_weight(weight, weight_candidates("msfp", 4))
    names = [found.formats[int(index)].name for index in found.choice]
    assert set(names[:20]) == {"E1M2"}
    assert set(names[20:]) == {"E3M0"}


def test_rows_are_searched_alike_however_many_there_are_at_once(monkeypatch):
    weight = normal(37, 20)
    whole = search_weight(weight, weight_candidates("msfp", 4))
    monkeypatch.setattr("quant.search.LOOKUPS", 5000)
    parts = search_weight(weight, weight_candidates("msfp", 4))
    assert whole.formats == parts.formats
    assert torch.equal(whole.choice, parts.choice)
    assert torch.equal(whole.scale, parts.scale)


def test_a_channel_of_zeros_stays_zero_and_its_scale_is_a_number():
    weight = normal(3, 8)
    weight[1] = 0
    found = search_weight(weight, weight_candidates("msfp", 4))
    assert bool((found.scale > 0).all())
    assert float(found.error[1]) == 0
    assert bool((search_weight(torch.zeros(2, 3), weight_candidates("int", 4)).scale > 0).all())


def test_inputs_have_the_grid_that_trying_them_all_finds():
    x = F.silu(normal(2000) * 2)
    low, high = float(x.min()), float(x.max())
    best = search_input(x, low, high, input_candidates("msfp", 4, anomalous=True))
    errors = [
        tried(x, format, format.scale(torch.tensor((high - zero) * factor, dtype=torch.float64)), torch.tensor(zero))
        for format in map(FloatFormat.parse, UNSIGNED[4])
        for zero in torch.linspace(low, 0, 8).tolist()
        for factor in torch.linspace(0.05, 1.2, 40).tolist()
    ]
    square = float(x.double().square().sum())
    assert not best[0].format.signed
    assert best[0].nmse == pytest.approx(min(errors) / square, rel=1e-3)
    again = tried(x, best[0].format, torch.tensor(best[0].scale), torch.tensor(best[0].zero))
    assert best[0].nmse == pytest.approx(again / square, rel=1e-4)
    assert [grid.nmse for grid in best] == sorted(grid.nmse for grid in best)
    assert {grid.format.name for grid in best} == {*SIGNED[4], *UNSIGNED[4]}


def test_behind_silu_dropping_the_sign_beats_signed_formats_and_integers():
    x = F.silu(normal(100_000))
    low, high = float(x.min()), float(x.max())
    families = ("msfp", "signed", "int", "int-minmax")
    nmse = {family: search_input(x, low, high, input_candidates(family, 4, True))[0].nmse for family in families}
    assert nmse["msfp"] < nmse["int"] < nmse["signed"]
    assert nmse["int"] < nmse["int-minmax"]
    assert nmse["msfp"] == pytest.approx(0.0062, abs=0.0006)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_weights_have_formats_whose_integers_fit_in_a_byte(bits):
    for format in weight_candidates("msfp", bits).signed:
        assert int(integers(format).abs().max()) <= 127


def test_integers_with_the_range_of_the_data_are_the_textbooks_asymmetric_ones():
    x = normal(1000) + 0.5
    low, high = float(x.min()), float(x.max())
    (grid,) = search_input(x, low, high, input_candidates("int-minmax", 4, False))
    assert (grid.format.name, grid.zero) == ("uE1M3", pytest.approx(low))
    assert grid.scale == pytest.approx((high - low) / 15)


@pytest.mark.parametrize("constant", [0.0, 1.5, -2.0])
def test_inputs_that_never_change_have_a_grid_that_holds_them(constant):
    for family in ("msfp", "int", "int-minmax"):
        best = search_input(torch.full((10,), constant), constant, constant, input_candidates(family, 4, True))[0]
        assert math.isfinite(best.scale)
        assert best.scale > 0
        assert best.nmse < 0.01


def test_what_is_not_finite_is_refused_with_how_many():
    with pytest.raises(QuantError, match="1 of the 4 numbers of the weight"):
        search_weight(torch.tensor([[1.0, math.nan], [0.0, 1.0]]), weight_candidates("msfp", 4))
    with pytest.raises(QuantError, match="1 of the 2 numbers of the sample"):
        search_input(torch.tensor([1.0, math.inf]), 0.0, 1.0, Candidates(signed=(FloatFormat(2, 1),)))
    with pytest.raises(QuantError, match="no sample"):
        search_input(torch.empty(0), 0.0, 1.0, Candidates(signed=(FloatFormat(2, 1),)))
