"""What words attend to: where the losses want it, that it is the model's own attention, and that it is learned."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dataclasses import replace  # noqa: E402

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from mllm.checkpoint import load_checkpoint  # noqa: E402
from mllm.tokenizer import WordTokenizer  # noqa: E402
from mllm.training.data import names_by_word  # noqa: E402
from mllm.training.pointing import (  # noqa: E402
    Watch,
    attention_of_words,
    naming_loss,
    places_of_words,
    pointing_loss,
    weights_of_tokens,
)
from mllm.vla import VLA, init_random  # noqa: E402

SHARES = st.floats(0, 1)


@given(SHARES, SHARES, st.integers(1, 9))
def test_an_object_weighs_on_the_tokens_around_it(row, column, side):
    weights = weights_of_tokens(np.array([row, column]), side).reshape(side, side)
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    centres = (np.arange(side) + 0.5) / side
    mean = [weights.sum(1) @ centres, weights.sum(0) @ centres]
    np.testing.assert_allclose(mean, np.clip([row, column], centres[0], centres[-1]), atol=1e-5)
    assert (np.argwhere(weights > 0).max(0) - np.argwhere(weights > 0).min(0)).max() <= 1


def test_what_is_not_seen_costs_nothing_and_each_view_has_a_head_of_its_own():
    places = np.full((2, 3, 2, 2), np.nan)
    assert not weights_of_tokens(places, 4).any()
    scores = torch.randn(2, 2, 3, 32)
    assert pointing_loss(scores, places) == 0
    places[1, 2, 0] = (0.125, 0.375)  # the centre of token 1 of the first view
    expected = -scores[1, 0, 2].log_softmax(0)[1]
    torch.testing.assert_close(pointing_loss(scores, places), expected)
    places[0, 1, 1] = (0.875, 0.875)  # the last token of the second
    expected = (expected - scores[0, 1, 1].log_softmax(0)[31]) / 2
    torch.testing.assert_close(pointing_loss(scores, places), expected)


def test_a_word_that_two_objects_begin_with_or_that_is_unknown_names_neither(make_demonstration):
    seen = np.zeros((5, 2, 2), np.float32)
    demos = [
        make_demonstration(objects={"milk": seen, "white mug": seen, "glazed ramekin": seen}),
        make_demonstration(objects={"white yellow mug": seen, "tomato sauce": seen}),
    ]
    tokenizer = WordTokenizer()
    assert names_by_word(demos, tokenizer) == {tokenizer.word("milk"): "milk", tokenizer.word("tomato"): "tomato sauce"}


def test_words_attend_in_the_loss_as_they_do_in_the_model(tiny):
    """The loss trains the attention of the model itself, read here from keys and queries of a real prompt."""
    model, tokenizer = load_checkpoint(tiny)
    visual = torch.randn(2, model.vision_backbone.tokens, model.config.decoder.hidden_size)
    hidden, positions, _ = model.prompt(visual, [tokenizer.prompt("now pick up the milk")] * 2)
    decoder, count = model.language_model.model, visual.shape[1]
    layer = decoder.layers[0]
    query, key, _ = layer.self_attn.project(layer.input_layernorm(hidden), decoder.rotary(positions, hidden.dtype))
    expected = query[:, :, -1:] @ key[:, :, 1 : count + 1].mT / layer.self_attn.size**0.5
    scores = attention_of_words(model, visual, torch.tensor([tokenizer.word("milk")]), 2)
    torch.testing.assert_close(scores, expected[:, :2])


def test_a_model_learns_which_words_stand_for_which_sight_and_which_word_counts(tiny):
    torch.manual_seed(0)
    small, tokenizer = load_checkpoint(tiny)
    decoder = replace(small.config.decoder, num_hidden_layers=3)
    model = init_random(VLA(replace(small.config, decoder=decoder)), 0).requires_grad_(True)
    words = [tokenizer.word(word) for word in ("milk", "ketchup", "butter")]
    texts = [tokenizer.prompt(f"pick up the {name} now") for name in ("milk", "ketchup", "butter", "plate")] * 2
    count, side = model.vision_backbone.tokens, int((model.vision_backbone.tokens // 2) ** 0.5)
    looks = torch.randn(3, model.config.decoder.hidden_size)
    generator = np.random.default_rng(0)

    def scene() -> tuple[torch.Tensor, np.ndarray]:
        """Three objects, each on a token of its own in the first view, the third hidden in every other sample."""
        visual, places = 0.3 * torch.randn(8, count, looks.shape[1]), np.full((8, 3, 2, 2), np.nan)
        for sample in range(8):
            for thing, token in enumerate(generator.choice(side * side, 3 - sample % 2, replace=False)):
                visual[sample, token] = looks[thing]
                places[sample, thing, 0] = (token // side + 0.5) / side, (token % side + 0.5) / side
        return visual, places

    def losses(visual: torch.Tensor, places: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        prompt, watch = model.prompt(visual, texts), Watch()
        model.teacher_forced(*prompt, torch.full((8, 7), 9), hook=watch)
        assert watch.second is not None
        named = places_of_words(texts, words, prompt[0].shape[1])
        assert (named >= 0).tolist() == [True, True, True, False] * 2
        scores = attention_of_words(model, visual, torch.tensor(words), 2)
        return pointing_loss(scores, places), naming_loss(watch.second, prompt[0].shape[1], named)

    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(100):
        optimiser.zero_grad()
        sum(losses(*scene())).backward()
        optimiser.step()
    visual, places = scene()
    found = attention_of_words(model, visual, torch.tensor(words), 2)[:, 0].argmax(-1).numpy()
    wanted = weights_of_tokens(places[:, :, 0], side).argmax(-1)
    assert (found == wanted)[np.isfinite(places[:, :, 0, 0])].all()
    assert losses(visual, places)[1] < 0.1


def test_padding_and_prompts_without_an_object_do_not_count(tiny):
    small, tokenizer = load_checkpoint(tiny)
    model = init_random(VLA(replace(small.config, decoder=replace(small.config.decoder, num_hidden_layers=3))), 0)
    visual = torch.randn(1, model.vision_backbone.tokens, model.config.decoder.hidden_size)
    milk, longer = (
        tokenizer.prompt("pick up the milk now"),
        tokenizer.prompt("put the wine bottle on the rack over there"),
    )

    def loss(texts: list[list[int]]) -> torch.Tensor:
        prompt, watch = model.prompt(visual.expand(len(texts), -1, -1), texts), Watch()
        model.teacher_forced(*prompt, torch.full((len(texts), 7), 9), hook=watch)
        length = prompt[0].shape[1]
        return naming_loss(watch.second, length, places_of_words(texts, [tokenizer.word("milk")], length))

    torch.testing.assert_close(loss([milk, longer]), loss([milk]), atol=1e-4, rtol=1e-4)
    assert loss([longer]) == 0
