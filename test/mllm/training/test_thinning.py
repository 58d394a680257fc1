"""Fewer visual tokens in training: which, that training and acting drop the same, and that it can be learned from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mllm.checkpoint import load_checkpoint  # noqa: E402
from mllm.compress import CompressConfig  # noqa: E402
from mllm.errors import PolicyError  # noqa: E402
from mllm.generate import ActionDecoder, compressor  # noqa: E402
from mllm.training import thinning as module  # noqa: E402
from mllm.training.config import TrainConfig  # noqa: E402
from mllm.training.learner import Learner  # noqa: E402
from mllm.training.pointing import Watch, naming_loss, places_of_words  # noqa: E402
from mllm.training.thinning import METHODS, draw_compression, thinning  # noqa: E402
from mllm.vla import VLA, init_random  # noqa: E402


@pytest.fixture
def model(tiny):
    """Three layers, 8 visual tokens of two cameras."""
    config = load_checkpoint(tiny)[0].config
    return init_random(VLA(replace(config, decoder=replace(config.decoder, num_hidden_layers=3))), 0)


def test_what_is_drawn_fits_and_covers_what_it_may():
    drawn = [draw_compression(np.random.default_rng(seed), 32, 2, 3) for seed in range(200)]
    for config in drawn:
        config.check(32, 2, 3)
    assert {config.method for config in drawn} == set(METHODS)
    assert {config.layer for config in drawn} == {1, 2}
    assert sorted({config.keep for config in drawn}) == [4, 6, 8, 10, 12, 14, 16]
    assert {draw_compression(np.random.default_rng(seed), 32, 2, 2).layer for seed in range(20)} == {1}
    assert draw_compression(np.random.default_rng(3), 32, 2, 3) == drawn[3]


@pytest.mark.parametrize("decoding", ["causal", "slots", "full"])
@pytest.mark.parametrize("method", ["flashvla", "tokencarve"])
def test_training_drops_what_acting_does(model, monkeypatch, decoding, method):
    model = init_random(VLA(replace(model.config, decoding=decoding)), 0)
    config = CompressConfig(method, keep=4, layer=1)
    monkeypatch.setattr(module, "draw_compression", lambda *_: config)
    prompt = model.prompt(torch.randn(2, 8, 32), [[1, 4, 5], [1, 6, 7]])
    found = []

    def noting(hook):
        def note(state):
            kept = hook(state)
            if kept is not None:
                found.append(kept.index[:, 1:5])
            return kept

        return note

    acting, training = compressor(model, config), thinning(model, np.random.default_rng(0))
    with torch.no_grad():
        if decoding == "causal":
            model.language_model.model(prompt[0], prompt[1], hook=noting(acting))
            model.teacher_forced(*prompt, torch.full((2, 7), 9), hook=noting(training))
        else:
            model.one_pass(*prompt, hook=noting(acting))
            model.one_pass(*prompt, hook=noting(training))
    assert torch.equal(*found)


@pytest.mark.parametrize(("trim", "alike"), [(False, True), (True, False)])
def test_a_causal_model_learns_to_act_with_its_first_layers_whole(model, trim, alike):
    model = init_random(VLA(replace(model.config, decoding="causal")), 0)
    config = CompressConfig("flashvla", keep=2, layer=2, trim=trim)
    torch.manual_seed(0)
    prompt = model.prompt(torch.randn(32, 8, 32), [[1, 4, 5]] * 32)
    acting = ActionDecoder(model, hook=compressor(model, config))
    with torch.no_grad():
        said = acting.decode(acting.prefill(*prompt))
        hidden = model.teacher_forced(*prompt, said, hook=compressor(model, config, taught=True))
        taught, _ = model.language_model.best(hidden, model.config.action_ids)
    assert torch.equal(said[:, 0], taught[:, 0])
    assert torch.equal(said, taught) == alike


@pytest.mark.parametrize("layer", [1, 2])
def test_the_loss_of_words_finds_them_where_tokens_are_gone(model, monkeypatch, layer):
    """A hook that keeps all tokens but one gives the place of a word one earlier, from its layer on."""
    texts = [[1, 4, 5, 6], [1, 7, 4]]
    prompt = model.prompt(torch.randn(2, 8, 32), texts)
    monkeypatch.setattr(module, "draw_compression", lambda *_: CompressConfig("uniform", keep=7, layer=layer))
    watch = Watch(thinning(model, np.random.default_rng(0)))
    model.teacher_forced(*prompt, torch.full((2, 7), 9), hook=watch)
    length = prompt[0].shape[1] - watch.dropped
    assert watch.dropped == (layer == 1)
    assert watch.second.hidden.shape[1] == length + 6
    named = places_of_words(texts, [4], length)
    loss = naming_loss(watch.second, length, named)
    scores = watch.second.query[:, :1, length - 1 :] @ watch.second.key[:, :1, :length].mT / 16**0.5
    if watch.second.valid is not None:
        scores = scores.masked_fill(~watch.second.valid[:, None, None, :length], -torch.inf)
    chance = scores[:, 0].softmax(-1)
    expected = -torch.stack([chance[i, :, place].log() for i, place in enumerate(named)]).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("method", METHODS)
def test_what_stays_is_learned_from_and_what_is_gone_only_where_it_was_merged(model, monkeypatch, method):
    monkeypatch.setattr(module, "draw_compression", lambda *_: CompressConfig(method, keep=4, layer=1))
    for layer in model.language_model.model.layers:  # no attention: a token sees nothing but itself
        layer.self_attn.o_proj.weight.data.zero_()
    visual = torch.randn(1, 8, 32, requires_grad=True)
    prompt = model.prompt(visual, [[1, 4]])
    kept, hook = [], thinning(model, np.random.default_rng(0))

    def note(state):
        answer = hook(state)
        kept.extend([] if answer is None else [answer])
        return answer

    hidden = torch.cat((prompt[0], torch.zeros(1, 6, 32)), 1)  # where an answer would stand
    out = model.language_model.model(hidden, torch.arange(hidden.shape[1])[None], hook=note)
    out[:, 1:5].square().sum().backward()
    stays = set((kept[0].index[0, 1:5] - 1).tolist())
    merged = set() if kept[0].merged is None else set((kept[0].merged[0, :, 0] - 1).tolist())
    assert set(visual.grad[0].any(-1).nonzero()[:, 0].tolist()) == stays | merged
    assert len(merged) == (2 if method == "tokencarve" else 0)


def test_one_layer_has_nothing_behind_it_to_go_on_with_less(model):
    one = VLA(replace(model.config, decoder=replace(model.config.decoder, num_hidden_layers=1)))
    Learner(one, TrainConfig("run", ("data",)), phases=3)
    with pytest.raises(PolicyError, match=r"thin_share is 0\.5: .* one layer"):
        Learner(one, TrainConfig("run", ("data",), thin_share=0.5), phases=3)
