"""How noise is added in training (DDPM), and taken away again in a few steps (DDIM)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mllm.config import check_numbers, check_sizes
from mllm.errors import PolicyError
from quant.dfa import ddim_gamma

# Noise rates of the first and the last level, times their number: those of Ho et al. (arXiv 2006.11239) at 1000.
LEAST, MOST = 0.1, 20.0


@dataclass(frozen=True)
class Schedule:
    """times: noise levels in training.  steps: of the sampler, evenly spread from the noisiest level (our choice, after
    Lin et al., arXiv 2305.08891).
    limit: largest magnitude of a clean number, where it is known, else None; in each step what x would be without the
        noise foretold is cut there, and the noise is what remains. Errors in the first steps then grow less than gamma
        says.
    Raises PolicyError: other sizes.
    """

    times: int = 1000
    steps: int = 20
    limit: float | None = None

    def __post_init__(self) -> None:
        check_sizes(self, {"times": (25, 10_000)})
        check_sizes(self, {"steps": (1, self.times)})
        if self.limit is not None:
            check_numbers(self, {"limit": (1e-3, 1e6)})

    @cached_property
    def alpha_bar(self) -> Tensor:
        """(times,) float64: the share of the signal's power that is left."""
        betas = torch.linspace(LEAST, MOST, self.times, dtype=torch.float64) / self.times
        return (1 - betas).cumprod(0)

    @cached_property
    def visited(self) -> list[int]:
        """The level of each of the sampler's steps, descending."""
        return [self.times - 1 - step * self.times // self.steps for step in range(self.steps)]

    @cached_property
    def path(self) -> tuple[Tensor, Tensor]:
        """(steps,) float64 each: alpha_bar of the visited levels, and of those that the steps lead to, 1 at the end."""
        levels = self.alpha_bar[self.visited]
        return levels, torch.cat((levels[1:], levels.new_ones(1)))

    @cached_property
    def gamma(self) -> Tensor:
        """(steps,) float64: what the noise that is foretold counts in each step; see `quant.dfa`."""
        return ddim_gamma(*self.path)

    def noised(self, x: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """x, noise: (B, ...); times: (B,) int64. Returns sqrt(abar) x + sqrt(1 - abar) noise."""
        left = self.alpha_bar.to(x.device)[times].view(-1, *[1] * (x.dim() - 1))
        return left.sqrt().to(x.dtype) * x + (1 - left).sqrt().to(x.dtype) * noise

    def sample(
        self,
        predict: Callable[[int, Tensor], Tensor],
        noise: Tensor,
        see: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """DDIM without noise of its own (Song et al., arXiv 2010.02502, equation 12 with sigma 0).

        predict: (step, x) -> the noise in x, in step 0 to `steps` - 1.  noise: (B, ...), where it begins.
        see: is told of every step its number, x and the answer.
        Returns x at the end, of noise's shape.
        """
        x = noise
        for step, (left, then) in enumerate(zip(*(level.tolist() for level in self.path), strict=True)):
            found = predict(step, x)
            if found.shape != x.shape:
                raise PolicyError(f"the noise foretold has shape {tuple(found.shape)}: x has {tuple(x.shape)}")
            if see is not None:
                see(step, x, found)
            clean = (x - (1 - left) ** 0.5 * found) / left**0.5
            if self.limit is not None:
                clean = clean.clamp(-self.limit, self.limit)
                found = (x - left**0.5 * clean) / (1 - left) ** 0.5
            x = then**0.5 * clean + (1 - then) ** 0.5 * found
        return x
