"""The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels, and how far drawn ones are from them."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.diffusion.fit import init_linear
from mllm.errors import PolicyError

PIXELS, BRIGHTEST, FEATURES = 64, 16, 32


@cache
def digits() -> tuple[Tensor, Tensor]:
    """(1797, 64) float32 in [-1, 1], and which digit each is, (1797,) int64. Raises PolicyError: no scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise PolicyError("the digits come with scikit-learn: pip install 'flashvla_ros[experiment]'") from error
    found = load_digits()
    return torch.from_numpy(found.data).float() / (BRIGHTEST / 2) - 1, torch.from_numpy(found.target).long()


class Classifier(nn.Module):
    """Tells the digits apart; `features` is what it goes by."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(PIXELS, 128), nn.Linear(128, FEATURES), nn.Linear(FEATURES, 10)

    def features(self, x: Tensor) -> Tensor:
        """x: (B, 64) in [-1, 1]. Returns (B, 32)."""
        return F.gelu(self.fc2(F.gelu(self.fc1(x))))

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, 10) logits."""
        return self.fc3(self.features(x))


def train_classifier(steps: int = 600, seed: int = 0) -> Classifier:
    """By AdamW on all digits, noise added; the same one for every run of an experiment."""
    x, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    model = Classifier()
    init_linear(model, generator)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,), generator=generator)
        seen = x[rows] + 0.2 * torch.randn(len(rows), PIXELS, generator=generator)
        loss = F.cross_entropy(model(seen), labels[rows])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    return model.requires_grad_(False)


def frechet(a: Tensor, b: Tensor) -> float:
    """a, b: (n, F), (m, F) features. Returns |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the distance of
    two normal distributions (Heusel et al., arXiv 1706.08500, with another network's features).

    The root's trace is that of (C_a^(1/2) C_b C_a^(1/2))^(1/2), which is symmetric.
    """
    a, b = a.double(), b.double()
    first, second = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    crossed = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * crossed)
