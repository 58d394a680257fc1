"""The score against the singular value decomposition that defines it, and its properties."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from mllm.contribution import MANY, WIDE, gram, information_contribution  # noqa: E402


def by_definition(tokens, energy=1.0):
    """Of (N, d): the sum over i of |u_xi| s_i, from the full decomposition in float64."""
    left, sizes, _ = torch.linalg.svd(tokens.double(), full_matrices=True)
    squares = sizes**2
    terms = len(sizes)
    if energy < 1:
        terms = int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1
    return (left[:, :terms].abs() * sizes[:terms]).sum(1)


def drawn(count, size, seed, shared=3.0):
    """Tokens with a large mean and falling singular values, as a decoder's are."""
    generator = torch.Generator().manual_seed(seed)
    falling = 0.8 ** torch.arange(size)
    mean = torch.randn(1, size, generator=generator) * shared
    return torch.randn(count, size, generator=generator) * falling + mean


matrices = st.builds(drawn, st.integers(2, 40), st.integers(2, 50), st.integers(0, 10_000), st.floats(0, 10))
some = settings(max_examples=30, deadline=None)


@pytest.fixture(autouse=True)
def _one_thread(_two_threads_and_a_seed):
    # Decompositions this small only wait for a second.
    torch.set_num_threads(1)


@pytest.mark.parametrize("energy", [1.0, 0.999, 0.9, 0.5, 1e-6])
@pytest.mark.parametrize("shape", [(3, 20, 50), (2, 30, 12)], ids=["wide", "tall"])
def test_the_score_is_the_definitions_for_every_sample_of_a_batch(shape, energy):
    tokens = torch.stack([drawn(*shape[1:], seed) for seed in range(shape[0])])
    scores = information_contribution(tokens, energy)
    assert scores.dtype == torch.float64
    for sample, expected in zip(scores, tokens, strict=True):
        # What is 0 in the definition is rounding here, of the order of 1e-8 of the largest.
        assert torch.allclose(sample, by_definition(expected, energy), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_too_wide_for_float64_keep_what_the_definition_keeps(dtype):
    tokens = (torch.randn(3, 60, WIDE) + 10 * torch.randn(3, 1, WIDE)).to(dtype)
    scores = information_contribution(tokens)
    for sample, expected in zip(scores, map(by_definition, tokens), strict=True):
        assert torch.allclose(sample, expected, rtol=1e-5)
        assert set(sample.topk(30).indices.tolist()) == set(expected.topk(30).indices.tolist())
    assert torch.allclose(information_contribution(tokens.double()), torch.stack([*map(by_definition, tokens)]))


@pytest.mark.parametrize("shape", [(20, 32), (MANY, 32), (20, WIDE), (2, MANY, 16)], ids=str)
def test_many_and_wide_tokens_are_scored_as_few_and_narrow_ones_with_a_gradient_or_without(shape):
    tokens = torch.randn(shape)
    scores = information_contribution(tokens)
    expected = torch.stack([by_definition(sample) for sample in tokens.view(-1, *shape[-2:])]).view(shape[:-1])
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(information_contribution(tokens.requires_grad_()).detach(), scores)


@some
@given(matrices, st.integers(0, 100))
def test_permuted_tokens_have_permuted_scores(tokens, seed):
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(information_contribution(tokens[order]), information_contribution(tokens)[order], rtol=1e-6)


@some
@given(matrices, st.integers(0, 100))
def test_neither_a_rotation_nor_a_sign_changes_a_score(tokens, seed):
    size = tokens.shape[1]
    square = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    turned = tokens.double() @ torch.linalg.qr(square).Q
    scores = information_contribution(tokens)
    assert torch.allclose(information_contribution(turned), scores, rtol=1e-5)
    assert torch.allclose(information_contribution(-tokens), scores, rtol=1e-6)


@some
@given(matrices)
def test_a_score_lies_between_the_tokens_length_and_its_multiple_by_the_root_of_the_rank(tokens):
    scores, length = information_contribution(tokens), tokens.double().norm(dim=1)
    rank = min(tokens.shape)
    assert (scores >= length * (1 - 1e-9)).all()
    assert (scores <= length * rank**0.5 * (1 + 1e-6)).all()


@some
@given(matrices, st.floats(0.1, 0.99))
def test_fewer_terms_give_lower_scores(tokens, energy):
    assert (information_contribution(tokens, energy) <= information_contribution(tokens) + 1e-9).all()


def test_centring_and_normalising_are_those_of_the_tokens_themselves():
    tokens = drawn(20, 30, 1).double()
    centred = tokens - tokens.mean(0)
    assert torch.allclose(gram(tokens, centre=True), gram(centred))
    both = centred / centred.norm(dim=1, keepdim=True)
    assert torch.allclose(gram(tokens, centre=True, normalise=True), gram(both))
    assert torch.allclose(information_contribution(tokens, centre=True, normalise=True), by_definition(both), rtol=1e-6)


def test_tokens_that_are_all_the_same_have_the_same_score():
    scores = information_contribution(torch.ones(1, 6, 4))
    assert torch.allclose(scores, torch.full((1, 6), 2.0, dtype=torch.float64))
    assert torch.isfinite(information_contribution(torch.ones(1, 6, 4), centre=True, normalise=True)).all()
    assert (information_contribution(torch.zeros(1, 6, 4)) == 0).all()
