"""A digest is of everything that a model's answers depend on, and of nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from mllm.checkpoint import load_checkpoint  # noqa: E402
from mllm.digest import DIGEST, weights_digest  # noqa: E402
from mllm.policy import make_policy  # noqa: E402
from mllm.vla import VLA  # noqa: E402
from quant.convert import replace_  # noqa: E402
from quant.formats import FloatFormat  # noqa: E402
from quant.packed import Activation, PackedLinear  # noqa: E402


def load(folder) -> VLA:
    return load_checkpoint(folder)[0]


def test_one_checkpoint_has_one_digest_however_it_is_used(tiny):
    expected = {DIGEST: weights_digest(load(tiny))}
    assert make_policy(str(tiny)).provenance == expected
    options = {"reuse": "gated", "compress": {"method": "uniform", "layer": 1}, "keep": 4}
    assert make_policy(str(tiny), **options).provenance == expected


def test_every_weight_its_type_and_the_configuration_count(tiny):
    found = [weights_digest(load(tiny)), weights_digest(load(tiny).half())]
    for name in load(tiny).state_dict():
        model = load(tiny)
        model.state_dict()[name].view(-1)[-1] += 1
        found.append(weights_digest(model))
    model = load(tiny)
    model.config = replace(model.config, gripper="opening")
    found.append(weights_digest(model))
    assert len(set(found)) == len(found)


def test_of_packed_layers_the_codes_and_what_they_mean_count(tiny):
    model, found = load(tiny), []
    name, layer = next((name, part) for name, part in model.named_modules() if isinstance(part, torch.nn.Linear))
    codes = torch.arange(layer.weight.numel()).reshape(layer.weight.shape).to(torch.uint8) % 16
    scale, choice = torch.ones(len(codes)), torch.zeros(len(codes), dtype=torch.uint8)
    for format, changed, grid in (("E2M1", 0, 0.1), ("E1M2", 0, 0.1), ("E2M1", 1, 0.1), ("E2M1", 0, 0.2)):
        codes[-1, -1] = changed
        activation = Activation(FloatFormat.parse("E2M3"), grid)
        packed = PackedLinear(codes, [FloatFormat.parse(format)], choice, scale, None, activation)
        replace_(model, name, packed)
        found.append(weights_digest(model))
    assert len(set(found)) == 4
