"""Adapters are merged before quantising, chosen hard, trained softly, and deployed as the very same weights."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

from quant.calibration import calibrate  # noqa: E402
from quant.config import MSFPConfig  # noqa: E402
from quant.convert import quantise_layer  # noqa: E402
from quant.errors import QuantError  # noqa: E402
from quant.formats import quantise  # noqa: E402
from quant.packed import Activation, PackedLinear  # noqa: E402
from quant.search import FAMILIES, input_candidates, search_input, search_weight, weight_candidates  # noqa: E402
from quant.talora import AdaptedLinear, Copies, LayerGrids, Talora, TaloraConfig  # noqa: E402

STEPS = 6


def grids(layer, x, family="msfp", bits=4):
    weight = search_weight(layer.weight, weight_candidates(family, bits))
    best = search_input(x, float(x.min()), float(x.max()), input_candidates(family, bits, True))[0]
    return LayerGrids(weight, Activation(best.format, best.scale, best.zero))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 5)

    def forward(self, x):
        return self.second(F.silu(self.first(x)))


def adapted(adapters=3, rank=2, seed=0):
    """A model whose adapters are not zero, and inputs."""
    model, x = Toy(), torch.randn(64, 12)
    hidden = F.silu(model.first(x)).detach()
    found = {"first": grids(model.first, x), "second": grids(model.second, hidden)}
    talora = Talora(model, found, TaloraConfig(adapters, rank, seed=seed), torch.randn(STEPS, 8))
    for layer in talora.layers().values():
        nn.init.normal_(layer.up, std=0.3)
    return talora, model, x


def test_adapters_are_merged_before_quantising():
    talora, _, _ = adapted()
    layer = talora.layers()["first"]
    grid, gate = layer.grids.weight, torch.tensor([0.0, 1.0, 0.0])
    lora = layer.up[1] @ layer.down[1]
    quantised = layer.quantised(gate)
    for channel in range(20):
        format, scale = grid.formats[int(grid.choice[channel])], grid.scale[channel]
        expected = quantise(layer.weight[channel] + lora[channel], format, scale)
        torch.testing.assert_close(quantised[channel], expected, rtol=0, atol=0)
    afterwards = layer.quantised(torch.zeros(3)) + lora
    assert (quantised - afterwards).abs().max() > 0.01


def test_the_choice_is_hard_and_its_gradient_is_that_of_the_softmax():
    talora, _, _ = adapted()
    router, weights = talora.router, torch.randn(3)
    nn.init.normal_(router.fc2.weight)
    for step in range(STEPS):
        gate = router.gate(step)
        assert sorted(gate.tolist()) == [0.0, 0.0, 1.0]
        assert int(gate.argmax()) == router.table()[step]
        hard = torch.autograd.grad((gate * weights).sum(), router.fc2.weight)[0]
        soft = torch.autograd.grad((router.logits()[step].softmax(-1) * weights).sum(), router.fc2.weight)[0]
        torch.testing.assert_close(hard, soft)
        assert hard.abs().max() > 0


def test_a_step_trains_its_adapter_and_the_router_and_nothing_else():
    talora, model, x = adapted()
    talora.at(0)(x).square().sum().backward()
    chosen = talora.table(STEPS)[0]
    for layer in talora.layers().values():
        for matrices in (layer.up, layer.down):
            moved = matrices.grad.abs().amax((1, 2)) > 0
            assert moved.tolist() == [place == chosen for place in range(3)]
    assert talora.router.fc2.weight.grad.abs().max() > 0
    assert {id(weight) for weight in talora.trained()} == {
        id(weight) for name, weight in talora.named_parameters() if "up" in name or "down" in name or "router" in name
    }
    assert all(weight.grad is None for weight in model.parameters())


def test_at_first_each_adapter_has_an_equal_share_of_consecutive_steps():
    talora, _, _ = adapted()
    assert talora.table(STEPS) == [0, 0, 1, 1, 2, 2]


def test_without_adapters_it_is_the_quantised_model_and_new_adapters_change_nothing():
    model, x = Toy(), torch.randn(64, 12)
    found = {"first": grids(model.first, x)}
    outputs = []
    for count in (0, 1, 4):
        talora = Talora(model, found, TaloraConfig(count), torch.randn(STEPS, 8))
        outputs.append(talora.at(STEPS - 1)(x))
    layer, grid = talora.layers()["first"], found["first"]
    inputs = quantise(x, grid.inputs.format, torch.tensor(grid.inputs.scale), torch.tensor(grid.inputs.zero))
    expected = model.second(F.silu(F.linear(inputs, layer.quantised(torch.zeros(4)), model.first.bias)))
    for output in outputs:
        torch.testing.assert_close(output, expected, rtol=0, atol=0)


@pytest.mark.parametrize("act_bits", [4, None])
def test_the_grids_of_a_packed_layer_make_the_same_layer_again(act_bits):
    model, x = Toy(), torch.randn(64, 12)
    seen = calibrate(model, lambda: model(x))["second"]
    packed, report = quantise_layer("second", model.second, MSFPConfig(4, act_bits), seen)
    found = LayerGrids.of(model.second, packed)
    assert found.inputs == packed.activation
    assert found.weight.nmse == pytest.approx(report.weight_nmse, rel=1e-4)
    layer = AdaptedLinear(model.second, found, 1, 2, torch.Generator().manual_seed(0))
    assert torch.equal(layer.packed(0).codes(), packed.codes())
    hidden = F.silu(model.first(x)).detach()
    torch.testing.assert_close(layer(hidden), packed(hidden), rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(FAMILIES),
    st.sampled_from([4, 6, 8]),
    st.integers(1, 20),
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(0, 2**16),
)
def test_packed_copies_hold_the_fake_quantised_weights_bit_for_bit(family, bits, outputs, inputs, adapters, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(inputs, outputs)
    x = torch.randn(50, inputs, generator=generator)
    made = AdaptedLinear(layer, grids(layer, x, family, bits), adapters, 2, generator)
    with torch.no_grad():
        made.up.copy_(torch.randn(made.up.shape, generator=generator))
    for adapter in range(adapters):
        gate = F.one_hot(torch.tensor(adapter), adapters).float()
        packed = made.packed(adapter)
        assert torch.equal(packed.weight(), made.quantised(gate))
        made.gate = gate
        activation = packed.activation
        kept = activation.integers(x) * torch.tensor(activation.scale) + torch.tensor(activation.zero)
        torch.testing.assert_close(F.linear(kept, packed.weight(), layer.bias), made(x), rtol=0, atol=0)
        torch.testing.assert_close(packed(x), made(x), rtol=1e-4, atol=1e-4)


def test_deployed_each_step_reads_the_packed_copy_of_its_adapter_and_unused_ones_are_left_out():
    talora, _, x = adapted(adapters=4)
    with torch.no_grad():
        talora.router.fc2.bias.copy_(torch.tensor([0.0, -9.0, 0.0, 9.0]))
    table = talora.table(STEPS)
    assert 1 not in table
    deployed = talora.requires_grad_(False).deploy(STEPS)
    copies = [layer for layer in deployed.model.modules() if isinstance(layer, Copies)]
    assert [len(layer.copies) for layer in copies] == [len(set(table))] * 2
    for step in range(STEPS):
        expected = talora.at(step)(x)
        torch.testing.assert_close(deployed.at(step)(x), expected, rtol=1e-4, atol=1e-4)
        assert talora.layers()["first"].gate.argmax() == table[step]
    assert deployed.packed_bytes() == sum(
        buffer.numel() * buffer.element_size()
        for layer in deployed.model.modules()
        if isinstance(layer, PackedLinear)
        for buffer in layer.buffers()
    )


def test_what_is_no_linear_layer_and_what_is_out_of_range_are_refused():
    model = nn.Sequential(nn.SiLU())
    with pytest.raises(QuantError, match="'0' is a SiLU"):
        Talora(model, {"0": None}, TaloraConfig(), torch.zeros(2, 4))
    for name, value in (("adapters", -1), ("rank", 0), ("hidden", 1.0), ("seed", True)):
        with pytest.raises(QuantError, match=name):
            TaloraConfig(**{name: value})
