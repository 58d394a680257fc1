"""The head that asks visual tokens by words: what it is told, and that it finds what it was told."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from mllm.checkpoint import load_checkpoint  # noqa: E402
from mllm.training.objects import HEAD, attention_of_words, object_loss, weights_of_tokens  # noqa: E402

SHARES = st.floats(0, 1)


@given(SHARES, SHARES, st.integers(1, 9))
def test_an_object_weighs_on_the_tokens_around_it(row, column, side):
    weights = weights_of_tokens(np.array([row, column]), side).reshape(side, side)
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    centres = (np.arange(side) + 0.5) / side
    inside = np.clip([row, column], centres[0], centres[-1])
    mean = [weights.sum(1) @ centres, weights.sum(0) @ centres]
    np.testing.assert_allclose(mean, inside, atol=1e-5)
    assert (np.argwhere(weights > 0).max(0) - np.argwhere(weights > 0).min(0)).max() <= 1


def test_what_is_not_seen_weighs_nothing_and_costs_nothing():
    places = np.full((2, 3, 2, 2), np.nan)
    assert weights_of_tokens(places, 4).shape == (2, 3, 2, 16)
    assert not weights_of_tokens(places, 4).any()
    scores = torch.randn(2, 3, 32)
    assert object_loss(scores, places) == 0
    places[1, 2, 0] = (0.125, 0.375)  # the centre of token 1 of the first camera
    expected = -scores[1, 2].log_softmax(0)[1]
    torch.testing.assert_close(object_loss(scores, places), expected)


def test_words_attend_in_the_loss_as_they_do_in_the_model(tiny):
    """The loss trains the attention of the model itself, read here from keys and queries of a real prompt."""
    model, tokenizer = load_checkpoint(tiny)
    visual = torch.randn(2, model.vision_backbone.tokens, model.config.decoder.hidden_size)
    prompt, positions, _ = model.prompt(visual, [tokenizer.prompt("now pick up the milk")] * 2)
    decoder = model.language_model.model
    layer = decoder.layers[0]
    query, key, _ = layer.self_attn.project(layer.input_layernorm(prompt), decoder.rotary(positions, prompt.dtype))
    count = visual.shape[1]
    expected = query[:, HEAD, -1:] @ key[:, HEAD, 1 : count + 1].mT / layer.self_attn.size**0.5
    word = torch.tensor([tokenizer.word("milk")])
    torch.testing.assert_close(attention_of_words(model, visual, word), expected)


def test_a_model_learns_which_words_stand_for_which_sight(tiny):
    torch.manual_seed(0)
    model, tokenizer = load_checkpoint(tiny)
    words = torch.tensor([tokenizer.word(word) for word in ("milk", "ketchup", "butter")])
    count, hidden = model.vision_backbone.tokens, model.config.decoder.hidden_size
    side = int((count // 2) ** 0.5)
    model.requires_grad_(True)
    looks = torch.randn(3, hidden)
    generator = np.random.default_rng(0)

    def scene() -> tuple[torch.Tensor, np.ndarray]:
        """Three objects, each on a token of its own in the first view, the third hidden in every other sample."""
        visual, places = 0.3 * torch.randn(8, count, hidden), np.full((8, 3, 2, 2), np.nan)
        for sample in range(8):
            for thing, token in enumerate(generator.choice(side * side, 3 - sample % 2, replace=False)):
                visual[sample, token] = looks[thing]
                places[sample, thing, 0] = (token // side + 0.5) / side, (token % side + 0.5) / side
        return visual, places

    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        visual, places = scene()
        optimiser.zero_grad()
        object_loss(attention_of_words(model, visual, words), places).backward()
        optimiser.step()
    visual, places = scene()
    found = attention_of_words(model, visual, words).argmax(-1).numpy()
    wanted = weights_of_tokens(places[:, :, 0], side).argmax(-1)
    assert (found == wanted)[np.isfinite(places[:, :, 0, 0])].all()
