"""Fine-tuning a quantised diffusion model without data, and DFA: errors weigh by what the sampler makes of them (MSFP,
arXiv 2505.21591).

    loss_t = gamma_t * mean || eps_fp(x_t, t) - eps_q(x_t, t) ||^2

gamma_t is the coefficient of the predicted noise in the sampler's update from t. Where a sampler's coefficient is the
same in all steps, as in flow matching by equal Euler steps, normalised gamma is 1 and DFA changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.errors import QuantError


def ddpm_gamma(alpha: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_{t-1} = (x_t - gamma' eps) / sqrt(alpha) + noise (Ho et al., arXiv 2006.11239, algorithm 2).

    alpha, alpha_bar: (S,), 1 - beta_t and its product up to t. Returns (S,): (1 - a) / (sqrt(a) sqrt(1 - abar)).
    """
    return (1 - alpha) / (alpha.sqrt() * (1 - alpha_bar).sqrt())


def ddim_gamma(alpha_bar: Tensor, previous: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
    """The coefficient of eps in x_prev = sqrt(abar_prev) x0(x_t, eps) + sqrt(1 - abar_prev - sigma^2) eps + sigma noise
    (Song et al., arXiv 2010.02502, equation 12), without its sign.

    alpha_bar, previous: (S,), of a step and of the one that the sampler goes to.  sigma: its noise, 0 is DDIM's.
    """
    direct = (1 - previous - sigma**2).clamp(min=0).sqrt()
    return (direct - previous.sqrt() * (1 - alpha_bar).sqrt() / alpha_bar.sqrt()).abs()


def normalised(gamma: Tensor) -> Tensor:
    """Of mean 1, so that the learning rate means the same with and without. Raises QuantError: a mean that is not above
    0.
    """
    mean = gamma.mean()
    if not (bool(mean.isfinite()) and float(mean) > 0):
        raise QuantError(f"the mean of gamma is {float(mean)}: look at the sampler's steps")
    return gamma / mean


@dataclass(frozen=True)
class DistilConfig:
    """updates: of the weights.  batch: states a step, all of one step of the sampler.  rate: of Adam, which falls to 0
    by half a cosine.  seed: of what is drawn.
    """

    updates: int = 1200
    batch: int = 64
    rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("updates", 0, 10**7),
            ("batch", 1, 1 << 20),
            ("rate", 0.0, 1.0),
            ("seed", 0, 2**32 - 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, type(low))) or not low <= value <= high:
                raise QuantError(f"DistilConfig.{name} is {value!r}: it must be from {low} to {high}")


def distil(
    student: Callable[[int, Tensor], Tensor],
    answers: Tensor,
    parameters: Sequence[nn.Parameter],
    config: DistilConfig,
    gamma: Tensor | None = None,
) -> list[float]:
    """Trains `parameters` until the student answers as the teacher did. Returns the losses, without gamma.

    student: (step, rows) -> what it answers to the states that the teacher saw in that step, for so many rows.
    answers: (S, n, ...), what the teacher answered to n states in each of the sampler's S steps.
    gamma: (S,), what a step's error counts; None counts them alike.
    Steps are drawn in turns, each once in S updates, so that all have their share; the order and the rows are drawn.
    Raises QuantError: the loss is no number.
    """
    steps, count = answers.shape[:2]
    weights = torch.ones(steps) if gamma is None else gamma
    if weights.shape != (steps,):
        raise QuantError(f"gamma has shape {tuple(weights.shape)}: the sampler has {steps} steps")
    generator = torch.Generator().manual_seed(config.seed)
    optimiser = torch.optim.Adam(parameters, config.rate)
    course = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(config.updates, 1))
    losses: list[float] = []
    turns: list[int] = []
    for update in range(config.updates):
        turns = turns or torch.randperm(steps, generator=generator).tolist()
        step = turns.pop()
        rows = torch.randint(count, (config.batch,), generator=generator)
        loss = (student(step, rows) - answers[step, rows]).square().mean()
        if not bool(loss.isfinite()):
            raise QuantError(f"the loss is {loss.item()} in update {update}: lower the rate, now {config.rate}")
        optimiser.zero_grad(set_to_none=True)
        (weights[step] * loss).backward()
        optimiser.step()
        course.step()
        losses.append(loss.item())
    return losses
