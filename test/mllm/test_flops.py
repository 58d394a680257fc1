"""The formulas against torch's counter, on models of every kind."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from mllm.actions import ActionStatistics  # noqa: E402
from mllm.compress import METHODS, CompressConfig, Compressor  # noqa: E402
from mllm.config import DINOV2, SIGLIP, DecoderConfig, DiffusionConfig, TowerConfig, VLAConfig, named_config  # noqa: E402
from mllm.flops import counted, eigen_flops, step_flops, visual_flops  # noqa: E402
from mllm.generate import ActionDecoder, compressor  # noqa: E402
from mllm.kernels import matrix_weights  # noqa: E402
from mllm.vla import VLA, init_random  # noqa: E402

MINI = replace(named_config("mini"), decoder=DecoderConfig(192, 512, 4, 3, 3, 512, max_position_embeddings=512))
PROPRIO = {"proprio": ("eef_pos",), "proprio_statistics": ActionStatistics((-1.0,) * 3, (1.0,) * 3)}
MODELS = {
    "causal": MINI,
    "tokens in one pass": replace(MINI, decoding="slots", chunk=2),
    "regression": replace(MINI, decoding="slots", head="regression", chunk=8, **PROPRIO),
    "diffusion": replace(MINI, decoding="slots", head="diffusion", chunk=2, diffusion=DiffusionConfig(50, 3, 32, 2)),
    "two timm towers, grouped heads, all see all": VLAConfig(
        (TowerConfig(DINOV2, 84, width=32, depth=3, heads=2), TowerConfig(SIGLIP, 84, width=48, depth=4, heads=3)),
        DecoderConfig(96, 160, 4, 6, 2, 600, max_position_embeddings=96),
        decoding="full",
    ),
}
WORDS = 17


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    return init_random(VLA(MODELS[request.param]), 0).eval()


def chosen(model, method):
    return CompressConfig(method, keep=model.vision_backbone.tokens // 2)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_costs_what_torch_counts(model, method):
    config = model.config
    compress = chosen(model, method)
    decoder = ActionDecoder(model, hook=compressor(model, compress))
    size = config.image_size
    pixels = torch.randn(1, len(config.cameras), 3 * len(config.towers), size, size)
    proprio = torch.zeros(1, 3) if config.proprio else None
    texts = [[1, *range(3, 1 + WORDS), 2]]
    assert len(texts[0]) == WORDS
    measured = counted(lambda: decoder.generate(pixels, texts, proprio))
    assert step_flops(model, WORDS, compress, passes=decoder.passes)["step"] == pytest.approx(measured, rel=0.01)


@torch.inference_mode()
def test_every_pass_after_a_wrong_guess_costs_what_torch_counts():
    model = init_random(VLA(MODELS["causal"]), 0).eval()
    decoder = ActionDecoder(model)
    asked = model.prompt(model.visual_tokens(torch.randn(1, 1, 3, 128, 128)), [[1, *range(3, 1 + WORDS), 2]])
    first = decoder.prefill(*asked)
    answer = decoder.decode(first)
    measured = counted(lambda: decoder.decode(first, answer + 1))
    assert decoder.passes > 1
    assert step_flops(model, WORDS, passes=decoder.passes)["decode"] == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("method", ["none", "flashvla"])
def test_visual_tokens_alone_cost_what_torch_counts(model, method):
    compress, decoder = chosen(model, method), model.config.decoder
    tokens = model.vision_backbone.tokens
    hook = Compressor(compress, torch.arange(tokens)[None], decoder.num_hidden_layers, len(model.config.cameras))
    hidden = torch.randn(1, tokens, decoder.hidden_size)
    states = []
    model.language_model.model(hidden, torch.arange(tokens)[None], hook=lambda state: states.append(state))
    choosing = counted(lambda: [hook(state) for state in states])  # which the convention leaves out
    measured = counted(lambda: model.language_model.model(hidden, torch.arange(tokens)[None], hook=hook))
    assert visual_flops(decoder, tokens, compress) == pytest.approx(measured - choosing, rel=0.01)


def test_the_papers_share_comes_out():
    """FlashVLA keeps 160 of OpenVLA's 256 visual tokens: 35.4 % of operations less; its 55.7 % counts reuse too."""
    decoder = DecoderConfig()
    share = 1 - visual_flops(decoder, 256, CompressConfig("flashvla", keep=160)) / visual_flops(decoder, 256)
    assert share == pytest.approx(0.354, abs=0.002)


@pytest.mark.parametrize("chunk", [1, 8])
def test_options_of_the_selection_cost_what_torch_counts(chunk):
    model = init_random(VLA(replace(MODELS["regression"], chunk=chunk)), 0).eval()
    decoder = ActionDecoder(model)
    visual = model.visual_tokens(torch.zeros(1, 2, 3, 128, 128))
    asked = model.prompt(visual, [[1, 5, 2]], torch.zeros(1, 3))
    plain = CompressConfig("tokencarve", keep=64)
    for compress in (
        replace(plain, per_camera=True),
        replace(plain, query="answer"),
        replace(plain, matrix="attention"),
        replace(plain, centre=True, layer=3),
    ):
        decoder.hook = compressor(model, compress)
        measured = counted(lambda: decoder.prefill(*asked))
        expected = step_flops(model, 3, compress)
        before = 2 * matrix_weights(model.proprio_projector)  # the proprioception's token
        assert expected["select"] + expected["prefill"] == measured + before


def test_eigenvectors_cost_a_quarter_where_each_of_two_cameras_has_its_own():
    whole = CompressConfig("flashvla")
    assert eigen_flops(128, 2, whole) == 4 * eigen_flops(128, 2, replace(whole, per_camera=True)) == 9 * 128**3
    assert eigen_flops(128, 2, CompressConfig("fastv")) == 0
