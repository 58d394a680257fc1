"""What the linear layers of a model are given: statistics and a bounded sample of each one's inputs.

Memory is bounded by the layers, not by the data: nothing but the sample and a few sums is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quant.errors import QuantError

SAMPLE = 1 << 16
# Functions whose outputs MSFP calls anomalous, and the least of them: Mish's, -0.309.
BOUNDED = ("gelu", "silu", "mish")
LOWEST = -0.309
SKEWED = 1.0
# Outputs of such functions that are told apart at a time.
RECENT = 4


@dataclass(frozen=True)
class Inputs:
    """The inputs of a linear layer, all numbers of all calls together.

    count: numbers seen.  minimum, maximum, mean, deviation, skew: theirs; skew is the third standardised moment.
    sample: (n,) float32, drawn from them evenly without replacement.
    follows: "gelu", "silu" or "mish" where such a function made the inputs, with nothing but views between; or "".
    """

    count: int
    minimum: float
    maximum: float
    mean: float
    deviation: float
    skew: float
    sample: Tensor
    follows: str = ""

    @property
    def bounded(self) -> bool:
        """Whether they look like what such a function makes: a floor no lower than Mish's, and a long tail above it
        (our choice).
        """
        return LOWEST <= self.minimum < 0 and self.maximum > -self.minimum and self.skew >= SKEWED

    @property
    def anomalous(self) -> bool:
        """An anomalous layer in the words of MSFP (arXiv 2505.21591): by structure, or by statistics."""
        return bool(self.follows) or self.bounded


def calibrate(model: nn.Module, run: Callable[[], object], size: int = SAMPLE, seed: int = 0) -> dict[str, Inputs]:
    """Inputs of every `nn.Linear` of the model that `run` brings about, by name, in the order of their first calls.

    run: calls the model on what it will see in use, as often as it likes; nothing of the model changes.
    size: most numbers of a layer's sample.  seed: of what is drawn.
    Raises QuantError: no layer ran, or one was given a number that is not finite.
    """
    if size < 1:
        raise QuantError(f"a sample of {size} numbers was asked for: at least 1 is needed")
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    watched: dict[str, _Watched] = {}
    seeds = {name: seed * len(layers) + place for place, (name, _) in enumerate(layers)}
    functions = _Functions()

    def see(name: str, layer: nn.Module, given: tuple[Any, ...]) -> None:
        if name not in watched:
            watched[name] = _Watched(size, torch.Generator().manual_seed(seeds[name]))
        watched[name].add(given[0].detach(), name)
        watched[name].makers.add(functions.maker(given[0]))

    with ExitStack() as stack:
        for name, layer in layers:
            stack.callback(layer.register_forward_pre_hook(partial(see, name)).remove)
        stack.enter_context(functions)
        run()
    if not watched:
        raise QuantError("no linear layer ran: calibrate with a function that calls the model")
    return {name: one.inputs() for name, one in watched.items()}


class _Functions(TorchDispatchMode):
    """Remembers the last outputs of the functions in `BOUNDED`; holding them keeps their memory theirs."""

    def __init__(self) -> None:
        super().__init__()
        self._recent: deque[tuple[str, Tensor]] = deque(maxlen=RECENT)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        if name in BOUNDED:
            self._recent.append((name, made))
        return made

    def maker(self, x: Tensor) -> str:
        place = x.untyped_storage().data_ptr()
        return next((name for name, made in self._recent if made.untyped_storage().data_ptr() == place), "")


@dataclass
class _Watched:
    """Sums, and a sample by random keys: a number is in it while its key is below `limit`, which sinks as more come."""

    size: int
    generator: torch.Generator
    limit: float = 1.0
    count: int = 0
    minimum: float = float("inf")
    maximum: float = float("-inf")
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    keys: Tensor = field(default_factory=lambda: torch.empty(0))
    sample: Tensor = field(default_factory=lambda: torch.empty(0))
    makers: set[str] = field(default_factory=set)

    def add(self, x: Tensor, name: str) -> None:
        x = x.flatten().float().cpu()
        if not len(x):
            return
        wrong = int((~x.isfinite()).sum())
        if wrong:
            raise QuantError(
                f"{wrong} of the {len(x)} inputs of layer '{name}' are not finite: look at what it was given"
            )
        self.count += len(x)
        self.minimum, self.maximum = min(self.minimum, float(x.min())), max(self.maximum, float(x.max()))
        wide = x.double()
        self.sums += torch.stack([wide.sum(), (wide**2).sum(), (wide**3).sum()])
        keys = torch.rand(len(x), generator=self.generator)
        taken = keys < self.limit
        keys, sample = torch.cat((self.keys, keys[taken])), torch.cat((self.sample, x[taken]))
        self.keys, self.sample = keys, sample
        if len(keys) > 2 * self.size:
            self._drop()

    def _drop(self) -> None:
        order = self.keys.argsort()[: self.size]
        self.keys, self.sample = self.keys[order], self.sample[order]
        if len(order) == self.size:
            self.limit = float(self.keys[-1])

    def inputs(self) -> Inputs:
        self._drop()
        mean, square, cube = (self.sums / max(self.count, 1)).tolist()
        variance = max(square - mean**2, 0.0)
        skew = (cube - 3 * mean * square + 2 * mean**3) / variance**1.5 if variance > 1e-12 * square else 0.0
        follows = self.makers.pop() if len(self.makers) == 1 else ""
        return Inputs(self.count, self.minimum, self.maximum, mean, variance**0.5, skew, self.sample, follows)
