"""Noise added and taken away, against literal loops."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from mllm.diffusion.schedule import Schedule  # noqa: E402
from mllm.errors import PolicyError  # noqa: E402


def test_what_is_left_of_the_signal_is_the_product_of_what_each_level_leaves():
    schedule, left = Schedule(1000, 20), 1.0
    for level in range(1000):
        left *= 1 - (0.1 + (20 - 0.1) * level / 999) / 1000
        assert float(schedule.alpha_bar[level]) == pytest.approx(left, rel=1e-9)
    x, noise, times = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.tensor([0, 500, 999])
    noised = schedule.noised(x, times, noise)
    for row, level in enumerate(times.tolist()):
        bar = float(schedule.alpha_bar[level])
        torch.testing.assert_close(noised[row], math.sqrt(bar) * x[row] + math.sqrt(1 - bar) * noise[row])


@pytest.mark.parametrize(("times", "steps"), [(1000, 20), (100, 7), (25, 25), (50, 1)])
def test_the_sampler_begins_at_the_noisiest_level_and_descends_evenly(times, steps):
    visited = Schedule(times, steps).visited
    assert len(visited) == steps
    assert visited[0] == times - 1
    gaps = [before - after for before, after in zip(visited, [*visited[1:], -1], strict=True)]
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


def test_sampling_is_the_published_update_step_by_step():
    schedule = Schedule(100, 6)
    rates = [0.1 + (20 - 0.1) * level / 99 for level in range(100)]
    bars = [math.prod(1 - rate / 100 for rate in rates[: level + 1]) for level in range(100)]

    def predict(step, x):
        return torch.sin(x + step)

    noise = torch.randn(5, 3, dtype=torch.float64)
    seen = []
    result = schedule.sample(predict, noise, lambda step, x, found: seen.append((step, x, found)))
    x = noise
    for step in range(6):
        now = bars[schedule.visited[step]]
        then = bars[schedule.visited[step + 1]] if step < 5 else 1.0
        found = predict(step, x)
        torch.testing.assert_close(seen[step][1], x)
        torch.testing.assert_close(seen[step][2], found)
        x = math.sqrt(then) * (x - math.sqrt(1 - now) * found) / math.sqrt(now) + math.sqrt(1 - then) * found
    torch.testing.assert_close(result, x)


def test_one_who_knows_the_noise_finds_what_was_hidden_in_it():
    schedule, hidden = Schedule(1000, 20), torch.randn(4, 6, dtype=torch.float64)

    def predict(step, x):
        bar = schedule.alpha_bar[schedule.visited[step]]
        return (x - bar.sqrt() * hidden) / (1 - bar).sqrt()

    torch.testing.assert_close(schedule.sample(predict, torch.randn(4, 6, dtype=torch.float64)), hidden)


def test_what_is_known_to_lie_within_limits_is_kept_there():
    end = Schedule(100, 6, limit=0.5).sample(lambda step, x: torch.zeros_like(x), torch.randn(50, 3))
    assert float(end.abs().max()) == 0.5


def test_gamma_is_how_far_an_error_in_one_step_moves_the_next_state():
    schedule, noise = Schedule(200, 8), torch.randn(1, 1, dtype=torch.float64)
    for step in range(8):
        states: dict[float, dict[int, float]] = {}
        for error in (0.0, 1.0):
            at = states.setdefault(error, {})
            end = schedule.sample(
                lambda place, x, error=error, step=step: torch.full_like(x, error if place == step else 0.0),
                noise,
                lambda place, x, found, at=at: at.__setitem__(place, float(x)),
            )
            at[8] = float(end)
        moved = abs(states[1.0][step + 1] - states[0.0][step + 1])
        assert moved == pytest.approx(float(schedule.gamma[step]), rel=1e-9)


def test_wrong_sizes_are_refused():
    for sizes in ((10, 5), (100, 0), (100, 101), (100, 5, 0.0)):
        with pytest.raises(PolicyError, match="Schedule"):
            Schedule(*sizes)
    with pytest.raises(PolicyError, match="shape"):
        Schedule(100, 2).sample(lambda step, x: x[:, :1], torch.zeros(2, 3))
