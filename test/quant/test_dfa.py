"""Gamma against the samplers' own updates, and what distillation makes of it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

from quant.dfa import DistilConfig, ddim_gamma, ddpm_gamma, distil, normalised  # noqa: E402
from quant.errors import QuantError  # noqa: E402

alphas = st.floats(0.2, 0.9999)
bars = st.floats(0.01, 0.9999)


def double(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def ancestral(x, noise, alpha, bar):
    """Ho et al., algorithm 2, line 4, without the noise that is added."""
    return (x - (1 - alpha) / (1 - bar).sqrt() * noise) / alpha.sqrt()


def implicit(x, noise, bar, previous, sigma):
    """Song et al., equation 12, without the noise that is added."""
    clean = (x - (1 - bar).sqrt() * noise) / bar.sqrt()
    return previous.sqrt() * clean + (1 - previous - sigma**2).sqrt() * noise


def slope(step, *rest):
    noise = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(step(torch.tensor(1.0, dtype=torch.float64), noise, *rest), noise)[0].abs()


@settings(deadline=None)
@given(alphas, bars)
def test_gamma_is_how_far_the_noise_foretold_moves_the_samplers_next_state(alpha, previous):
    alpha, previous = double(alpha, previous)
    bar = alpha * previous
    sigma = ((1 - previous) / (1 - bar) * (1 - alpha)).sqrt()
    torch.testing.assert_close(ddpm_gamma(alpha, bar), slope(ancestral, alpha, bar))
    torch.testing.assert_close(ddim_gamma(bar, previous), slope(implicit, bar, previous, 0 * sigma))
    torch.testing.assert_close(ddim_gamma(bar, previous, sigma), slope(implicit, bar, previous, sigma))


@settings(deadline=None)
@given(alphas, bars)
def test_with_ddpms_own_noise_both_gammas_are_one(alpha, previous):
    alpha, previous = double(alpha, previous)
    bar = alpha * previous
    sigma = ((1 - previous) / (1 - bar) * (1 - alpha)).sqrt()
    torch.testing.assert_close(ddim_gamma(bar, previous, sigma), ddpm_gamma(alpha, bar), rtol=1e-6, atol=1e-9)


def test_normalised_gamma_counts_one_on_average_and_equal_steps_count_alike():
    gamma = normalised(torch.tensor([0.5, 1.0, 4.5]))
    torch.testing.assert_close(gamma, torch.tensor([0.25, 0.5, 2.25]))
    torch.testing.assert_close(normalised(torch.full((7,), 0.1)), torch.ones(7))
    for wrong in (torch.zeros(3), torch.tensor([1.0, torch.nan])):
        with pytest.raises(QuantError, match="gamma"):
            normalised(wrong)


def compromise(gamma):
    """One number for two steps that want 0 and 1."""
    answers = torch.tensor([0.0, 1.0])[:, None, None].expand(2, 8, 1)
    number = nn.Parameter(torch.tensor([0.5]))
    config = DistilConfig(updates=600, batch=4, rate=0.02)
    losses = distil(lambda step, rows: number.expand(len(rows), 1), answers, [number], config, gamma)
    return number.item(), losses


def test_the_student_gives_way_where_gamma_is_small():
    alike, losses = compromise(None)
    assert alike == pytest.approx(0.5, abs=0.05)
    assert len(losses) == 600
    assert compromise(torch.tensor([1.8, 0.2]))[0] == pytest.approx(0.1, abs=0.05)


def test_every_step_has_its_turn_and_a_seed_says_all():
    target = torch.randn(5, 16, 3)
    seen: list[tuple[int, list[int]]] = []

    def run(seed):
        seen.clear()
        weight = nn.Parameter(torch.zeros(5, 3))

        def student(step, rows):
            seen.append((step, rows.tolist()))
            return weight[step].expand(len(rows), 3)

        distil(student, target, [weight], DistilConfig(updates=10, batch=4, seed=seed))
        return list(seen), weight.detach()

    first, weight = run(3)
    for start in (0, 5):
        assert sorted(step for step, _ in first[start : start + 5]) == [0, 1, 2, 3, 4]
    again, same = run(3)
    assert again == first
    assert torch.equal(same, weight)
    assert run(4)[0] != first


def test_a_loss_that_is_no_number_and_a_wrong_gamma_are_told():
    number, answers = nn.Parameter(torch.tensor([torch.inf])), torch.zeros(2, 4, 1)

    def student(step, rows):
        return number.expand(len(rows), 1)

    with pytest.raises(QuantError, match="loss is inf in update 0"):
        distil(student, answers, [number], DistilConfig(updates=1))
    with pytest.raises(QuantError, match="2 steps"):
        distil(student, answers, [number], DistilConfig(updates=1), torch.ones(3))
    for name, value in (("updates", -1), ("batch", 0), ("rate", 2.0), ("seed", 0.5)):
        with pytest.raises(QuantError, match=name):
            DistilConfig(**{name: value})
