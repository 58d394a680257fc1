"""The head that asks visual tokens by words: what it is told, and that it finds what it was told."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from mllm.training.objects import ObjectHead, object_loss, weights_of_tokens  # noqa: E402

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
    expected = -scores[1, 2, :16].log_softmax(0)[1]
    torch.testing.assert_close(object_loss(scores, places), expected)


def test_it_learns_which_words_stand_for_which_sight():
    torch.manual_seed(0)
    embed = torch.nn.Embedding(8, 16)
    looks = torch.randn(3, 16)
    head = ObjectHead(16, [[1, 3], [1, 4], [1, 5, 6]])
    generator = np.random.default_rng(0)

    def scene() -> tuple[torch.Tensor, np.ndarray]:
        """Three objects, each on a token of its own among 16, the third hidden in every other sample."""
        visual, places = 0.3 * torch.randn(8, 16, 16), np.full((8, 3, 1, 2), np.nan)
        for sample in range(8):
            for thing, token in enumerate(generator.choice(16, 3 - sample % 2, replace=False)):
                visual[sample, token] = looks[thing]
                places[sample, thing, 0] = (token // 4 + 0.5) / 4, (token % 4 + 0.5) / 4
        return visual, places

    optimiser = torch.optim.Adam([*head.parameters(), *embed.parameters()], 1e-2)
    for _ in range(150):
        visual, places = scene()
        optimiser.zero_grad()
        object_loss(head(embed, visual), places).backward()
        optimiser.step()
    visual, places = scene()
    found = head(embed, visual).argmax(-1).numpy()
    wanted = weights_of_tokens(places[:, :, 0], 4).argmax(-1)
    assert (found == wanted)[np.isfinite(places[:, :, 0, 0])].all()
