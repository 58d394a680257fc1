"""The distance of two sets of digits."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from mllm.diffusion.digits import digits, frechet, train_classifier  # noqa: E402


def test_the_distance_is_that_of_two_normal_distributions():
    linalg = pytest.importorskip("scipy.linalg")
    generator = np.random.default_rng(0)
    a = generator.normal(size=(300, 5)) @ generator.normal(size=(5, 5))
    b = generator.normal(size=(200, 5)) @ generator.normal(size=(5, 5)) + 0.7
    first, second = np.cov(a.T), np.cov(b.T)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first + second - 2 * linalg.sqrtm(first @ second).real)
    assert frechet(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-6)
    assert frechet(torch.from_numpy(a), torch.from_numpy(a)) == pytest.approx(0, abs=1e-9)
    moved = torch.from_numpy(a) + torch.tensor([3.0, 0, 0, 0, 4.0])
    assert frechet(torch.from_numpy(a), moved) == pytest.approx(25)


def test_halves_of_the_digits_are_near_and_noise_is_far():
    x, labels = digits()
    assert x.shape == (1797, 64)
    assert (float(x.min()), float(x.max())) == (-1, 1)
    classifier = train_classifier(steps=150)
    assert (classifier(x).argmax(1) == labels).float().mean() > 0.9
    seen = [
        classifier.features(one)
        for one in (x[::2], x[1::2], x[::2] + 0.5 * torch.randn(x[::2].shape), torch.rand(x.shape) * 2 - 1)
    ]
    near, noisy, noise = (frechet(seen[0], other) for other in seen[1:])
    assert near < noisy < noise
