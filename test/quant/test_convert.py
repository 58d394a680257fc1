"""A model is quantised layer by layer: which layers, in how many bits, in which formats, and with what result."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from quant.calibration import calibrate  # noqa: E402
from quant.config import MSFPConfig  # noqa: E402
from quant.convert import quantize_  # noqa: E402
from quant.errors import QuantError  # noqa: E402
from quant.formats import quantise  # noqa: E402
from quant.packed import PackedLinear  # noqa: E402
from quant.search import search_weight, weight_candidates  # noqa: E402


class Block(nn.Module):
    """An anomalous layer behind GELU, a gated one that is none, and one that never runs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(4, 8, 1)
        self.first = nn.Linear(8, 32)
        self.second = nn.Linear(32, 16)
        self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)
        self.unused = nn.Linear(5, 5)

    def forward(self, x):
        hidden = self.second(F.gelu(self.first(self.stem(x).mT)))
        return self.head(self.down(F.silu(self.gate(hidden)) * self.up(hidden)))


RAN = ("first", "second", "gate", "up", "down", "head")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture
def batch():
    return torch.randn(64, 4, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def seen(model, batch):
    return calibrate(model, lambda: model(batch))


def test_every_layer_computes_what_fake_quantisation_of_its_weights_and_inputs_does(model, seen, batch):
    original = copy.deepcopy(model)
    report = quantize_(model, MSFPConfig(compensate=False), seen)
    assert [one.name for one in report.layers] == list(RAN)
    for one in report.layers:
        packed, layer = model.get_submodule(one.name), original.get_submodule(one.name)
        grid = search_weight(layer.weight, weight_candidates("msfp", 8 if one.name in ("first", "head") else 4))
        rows = [
            quantise(row, grid.formats[choice], scale)
            for row, choice, scale in zip(layer.weight, grid.choice.tolist(), grid.scale, strict=True)
        ]
        x, kept = seen[one.name].sample[: 4 * layer.in_features].view(4, -1), one.activation
        zero = None if kept.format.signed else torch.tensor(kept.zero)
        expected = F.linear(quantise(x, kept.format, torch.tensor(kept.scale), zero), torch.stack(rows), layer.bias)
        torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-4)


def test_more_bits_bring_the_model_nearer_to_itself(model, seen, batch):
    def error(**options):
        changed = copy.deepcopy(model)
        quantize_(changed, MSFPConfig(ends=4, **options), seen, lambda: changed(batch))
        return float((changed(batch) - model(batch)).square().mean() / model(batch).square().mean())

    with torch.no_grad():
        errors = [error(bits=bits, act_bits=act) for bits, act in ((4, 4), (6, 6), (8, 8), (8, None))]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.1
    assert errors[-1] < 1e-3


def test_only_inputs_behind_gelu_lose_their_sign_and_only_in_msfp(model, seen):
    for family in ("msfp", "signed"):
        report = quantize_(copy.deepcopy(model), MSFPConfig(family=family, compensate=False), seen)
        unsigned = {one.name: one.anomalous for one in report.layers if not one.activation.format.signed}
        assert unsigned == ({"second": "gelu"} if family == "msfp" else {})


def test_the_configuration_overrules_what_calibration_saw(model, seen, batch):
    report = quantize_(model, MSFPConfig(anomalous={"sec*": False, "d*": True}), seen, lambda: model(batch))
    assert {one.name: one.anomalous for one in report.layers} == dict.fromkeys(RAN, "") | {"down": "config"}


def test_first_last_and_named_layers_keep_more_bits(model, seen, batch):
    report = quantize_(model, MSFPConfig(4, 4, least={"u*": (6, 8)}), seen, lambda: model(batch))
    bits = {
        one.name: (model.get_submodule(one.name).formats[0].bits, one.activation.format.bits) for one in report.layers
    }
    assert bits == dict.fromkeys(RAN, (4, 4)) | {"first": (8, 8), "head": (8, 8), "up": (6, 8)}
    assert MSFPConfig(4, None, least={"u*": (6, 8)}).bits_of("up") == (6, None)


def test_what_is_left_alone_is_explained(model, seen, batch):
    config = MSFPConfig(exclude={"gate": "it is delicate"})
    report = quantize_(model, config, seen, lambda: model(batch), lambda name, layer: name != "up")
    assert {one.name: (one.kind, one.why) for one in report.left} == {
        "stem": ("Conv1d", "not a linear layer"),
        "gate": ("Linear", "it is delicate"),
        "up": ("Linear", "the filter left it out"),
        "unused": ("Linear", "it did not run in calibration"),
    }
    packed = {name for name, part in model.named_modules() if isinstance(part, PackedLinear)}
    assert packed == {one.name for one in report.layers} == set(RAN) - {"gate", "up"}


def test_a_layer_that_has_two_names_is_replaced_under_both(batch):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(10, 10)
            self.parts = nn.ModuleList([self.one])

        def forward(self, x):
            return self.parts[0](self.one(x))

    model = Tied()
    quantize_(model, MSFPConfig(), calibrate(model, lambda: model(batch)), lambda: model(batch))
    assert isinstance(model.one, PackedLinear)
    assert model.parts[0] is model.one


def test_outputs_are_nearer_where_rounding_makes_up_for_itself(model, seen):
    fresh = torch.randn(64, 4, 10, generator=torch.Generator().manual_seed(2))

    def error(run):
        changed = copy.deepcopy(model)
        quantize_(changed, MSFPConfig(ends=4, compensate=run is not None), seen, run and (lambda: run(changed)))
        return float((changed(fresh) - model(fresh)).square().mean())

    batch = torch.randn(64, 4, 10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert error(lambda changed: changed(batch)) < 0.7 * error(None)


def test_where_memory_is_short_the_model_runs_for_every_layer_and_later_ones_see_what_earlier_ones_make(
    model, seen, batch, monkeypatch
):
    monkeypatch.setattr("quant.convert.MOMENTS", 1)
    runs = []

    def run():
        runs.append([name for name in RAN if isinstance(model.get_submodule(name), PackedLinear)])
        model(batch)

    quantize_(model, MSFPConfig(), seen, run)
    assert runs == [list(RAN[:count]) for count in range(len(RAN))]


def test_compensating_without_another_run_or_with_another_one_is_an_error(model, seen):
    with pytest.raises(QuantError, match="compensate needs `run`"):
        quantize_(model, MSFPConfig(), seen)
    with pytest.raises(QuantError, match="layer 'first' did not run again"):
        quantize_(model, MSFPConfig(), seen, lambda: None)


def test_calibration_of_another_model_and_weights_that_are_not_finite_are_errors_naming_the_layer(model, seen, batch):
    with pytest.raises(QuantError, match="layer 'first', which the model lacks"):
        quantize_(nn.Sequential(nn.Linear(2, 2)), MSFPConfig(), seen, lambda: None)
    model.up.weight.data[0, 0] = torch.nan
    with pytest.raises(QuantError, match="layer 'up': 1 of the 384"):
        quantize_(model, MSFPConfig(compensate=False), seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits is 5: choose one of 4, 6, 8"),
        ({"bits": None}, "bits is None"),
        ({"act_bits": 16}, "act_bits is 16"),
        ({"act_bits": 0}, "act_bits is 0"),
        ({"compensate": 1}, "compensate is 1: it must be true or false"),
        ({"family": "nf4"}, "family is 'nf4': choose one of msfp"),
        ({"least": {"a": 8}}, r"least\['a'\] is 8: give the bits of weights and of inputs"),
        ({"least": {"a": (8, 3)}}, r"least\['a'\]\[1\] is 3: choose one of"),
        ({"exclude": {"a": ""}}, r"exclude\['a'\] is '': say why"),
        ({"anomalous": {"a": "yes"}}, r"anomalous\['a'\] is 'yes': it must be true or false"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_an_error(options, message):
    with pytest.raises(QuantError, match=message):
        MSFPConfig(**options)
