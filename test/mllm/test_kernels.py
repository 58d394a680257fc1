"""Products, norm and attention against torch's own."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402
from torch.nn.functional import linear  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from mllm import kernels  # noqa: E402
from mllm.kernels import LARGE, ONEDNN, ONEDNN_ROWS, SMALL, Linear, attention, product, rms_norm  # noqa: E402

ROWS = [(1,), (1, 1), (1, 1, 1), (3, 1), (ONEDNN_ROWS,), (2, 33), (2, 3, 5)]
WEIGHTS = [(256, 192), (SMALL // 64 + 8, 64), (SMALL // 63 + 1, 63), (LARGE // 256 + 1, 256), (7, 5), (1, 3)]


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"])
def library(request, monkeypatch):
    """Both ways to multiply, whichever suits this processor."""
    if request.param and not ONEDNN:
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(kernels, "WIDE", request.param)


def close(ours, expected):
    return torch.allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
@pytest.mark.usefixtures("library")
@torch.no_grad()
def test_products_of_every_shape_are_torchs_to_rounding(rows, shape):
    count, size = shape
    x, weight, bias = torch.randn(*rows, size), torch.randn(shape), torch.randn(count)
    assert close(product(x, weight), linear(x, weight))
    assert close(product(x, weight, bias), linear(x, weight, bias))
    # Rows cut from a larger table, as the action tokens' are, and what does not lie row by row.
    part = torch.randn(3 * count, size)[count : 2 * count]
    assert close(product(x, part), linear(x, part))
    turned, sparse = torch.randn(size, count).T, torch.randn(*rows, 2 * size)[..., ::2]
    assert close(product(sparse, turned), linear(sparse, turned))


laying_out = pytest.mark.skipif(not kernels.LAYS_OUT, reason="oneDNN lays out no weights on this processor")


@laying_out
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(192, 64), (7, 5), (33, 100), (1, 3)], ids=str)
@pytest.mark.parametrize("rows", [(2,), (1, 6), (3, 40), (2, 3, 5)], ids=str)
@torch.inference_mode()
def test_laid_out_weights_give_torchs_products_to_rounding(rows, shape, biased):
    with torch.inference_mode(False):
        layer = Linear(shape[1], shape[0], bias=biased)
    x = torch.randn(*rows, 2 * shape[1])[..., ::2]
    expected = linear(x, layer.weight, layer.bias)
    assert close(layer(x), expected)
    assert layer._laid_out is not None
    assert torch.equal(layer(x), layer(x.contiguous()))


@laying_out
@torch.no_grad()
def test_other_weights_are_laid_out_anew():
    layer, x = Linear(24, 36), torch.randn(40, 24)
    layer(x)
    kept = layer._laid_out
    assert torch.equal(layer(x), layer(x))
    assert layer._laid_out is kept
    for change in (
        lambda: layer.weight.mul_(2),
        lambda: layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()}),
        lambda: setattr(layer, "weight", torch.nn.Parameter(torch.randn(36, 24))),
        lambda: setattr(layer.weight, "data", torch.randn(36, 24)),
    ):
        change()
        assert close(layer(x), linear(x, layer.weight, layer.bias))


@laying_out
@torch.no_grad()
def test_weights_that_come_to_lie_where_others_lay_are_laid_out_anew():
    layer, x = Linear(24, 36), torch.randn(40, 24)
    for _ in range(20):
        layer(x)
        for _ in range(2):  # the second may take the memory of the first
            layer.weight.data = torch.randn(36, 24)
        assert close(layer(x), linear(x, layer.weight, layer.bias))


@laying_out
def test_only_answers_on_the_processor_in_float32_by_modest_layers_take_laid_out_weights(monkeypatch):
    layer, x = Linear(24, 36), torch.randn(40, 24)
    layer(x)  # with gradients
    with torch.no_grad():
        layer(x[:1])  # one row has a kernel of its own
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        monkeypatch.setattr(kernels, "MODEST", 24 * 36 - 1)
        layer(x)
        monkeypatch.undo()
        layer.double()(x.double())
    assert layer._laid_out is None
    with torch.inference_mode():
        untracked = Linear(24, 36)
        untracked(x)
        assert untracked._laid_out is None


@laying_out
@torch.no_grad()
def test_copies_and_checkpoints_are_without_laid_out_weights():
    layer, x = Linear(24, 36), torch.randn(40, 24)
    expected = layer(x)
    twin, state = copy.deepcopy(layer), layer.state_dict()
    assert twin._laid_out is None
    assert sorted(state) == ["bias", "weight"]
    assert torch.equal(twin(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)


@laying_out
@torch.no_grad()
def test_operations_on_laid_out_weights_are_counted():
    layer, x = Linear(24, 36), torch.randn(40, 24)
    layer(x)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 40 * 24 * 36


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("count", [12, 36])
@pytest.mark.parametrize("rows", [(1, 1), (3, 40)], ids=str)
def test_gradients_are_torchs_to_rounding(rows, count, biased):
    layer, x = Linear(24, count, bias=biased), torch.randn(*rows, 24, requires_grad=True)
    towards = torch.randn(*rows, count)
    wanted = [x, *layer.parameters()]
    ours = torch.autograd.grad((layer(x) * towards).sum(), wanted)
    expected = torch.autograd.grad((linear(x, layer.weight, layer.bias) * towards).sum(), wanted)
    for gradient, reference in zip(ours, expected, strict=True):
        assert gradient.shape == reference.shape
        assert close(gradient, reference)


@pytest.mark.usefixtures("library")
def test_frozen_weights_and_frozen_inputs_get_no_gradient():
    layer, x = Linear(24, 36), torch.randn(40, 24)
    layer(x).sum().backward()
    assert x.grad is None
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    x.requires_grad_()
    layer(x).sum().backward()
    assert close(x.grad, layer.weight.sum(0).expand(40, -1))


@pytest.mark.usefixtures("library")
def test_operations_are_counted_forward_and_backward():
    layer, x = Linear(24, 36), torch.randn(40, 24, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 40 * 24 * 36


def test_autocast_decides_the_type_as_it_does_for_torchs_layer():
    layer, x = Linear(24, 36), torch.randn(40, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), torch.nn.Linear.forward(layer, x))
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_norm_and_its_gradients_are_torchs_to_rounding(dtype):
    x, weight = torch.randn(2, 5, 48, dtype=dtype, requires_grad=True), torch.rand(48, dtype=dtype, requires_grad=True)
    x.data[0, 0] = 0
    towards = torch.randn(2, 5, 48, dtype=dtype)
    ours, expected = rms_norm(x, weight, 1e-5), F.rms_norm(x, (48,), weight, 1e-5)
    rounding = 1e-2 if dtype == torch.bfloat16 else 1e-4
    assert torch.allclose(ours, expected, rtol=rounding)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, 1e-5), ours)
    gradients = torch.autograd.grad((ours * towards).sum(), (x, weight))
    references = torch.autograd.grad((expected * towards).sum(), (x, weight))
    for gradient, reference in zip(gradients, references, strict=True):
        assert ((gradient - reference).norm(dim=-1) <= rounding * reference.norm(dim=-1)).all()


@pytest.mark.parametrize("masking", ["none", "causal", "bias"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_in_bfloat16_is_as_near_to_float32s_as_torchs(masking, groups):
    exact = [torch.randn(2, heads, 9, 16) for heads in (4, groups, groups)]
    inputs = [part.bfloat16().requires_grad_() for part in exact]
    bias = torch.zeros(2, 1, 9, 9).masked_fill(torch.rand(2, 1, 9, 9) < 0.3, -torch.inf) if masking == "bias" else None
    if bias is not None:
        bias[..., range(9), range(9)] = 0
    narrow, causal = None if bias is None else bias.bfloat16(), masking == "causal"
    expected = attention(*[part.detach().float() for part in inputs], bias, causal)
    ours = attention(*inputs, narrow, causal)
    torchs = F.scaled_dot_product_attention(*inputs, narrow, is_causal=causal, enable_gqa=True)
    assert ours.dtype == torch.bfloat16
    assert float((ours - expected).detach().abs().max()) < 2 * float((torchs - expected).detach().abs().max()) + 1e-2
    towards = torch.randn_like(expected)
    for gradient, reference in zip(
        torch.autograd.grad((ours * towards).sum(), inputs),
        torch.autograd.grad((torchs * towards).sum(), inputs),
        strict=True,
    ):
        assert float((gradient - reference).norm() / reference.norm()) < 0.03
