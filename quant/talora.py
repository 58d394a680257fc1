"""TALoRA (MSFP, arXiv 2505.21591): fake-quantised linear layers with several low-rank adapters each, and one router
that says which of them a step of the sampler uses.

    W_q(t) = Q(W + sum_i g_i(t) B_i A_i)        merged before quantising
    g(t) = onehot(argmax p) + p - sg(p)         a hard choice, with the gradient of p = softmax(router(embedding of t))

With one adapter this is plain LoRA, and with none it is the quantised model alone. As nothing but the step decides, the
choices are a table once training is over, and a layer is as many packed copies as the table names adapters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.convert import pack_weight
from quant.errors import QuantError
from quant.formats import RowFormats, quantise
from quant.packed import Activation, PackedLinear
from quant.search import TINY, WeightGrid

# Logits by which a step favours its first adapter, for each adapter's share of the steps that lies between them.
SPREAD = 2.0


@dataclass(frozen=True)
class TaloraConfig:
    """adapters: of each layer; 1 is LoRA, 0 none.  rank: of each.  hidden: width of the router.  seed: of weights."""

    adapters: int = 4
    rank: int = 2
    hidden: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("adapters", 0, 64), ("rank", 1, 1024), ("hidden", 1, 4096), ("seed", 0, 2**32 - 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise QuantError(f"TaloraConfig.{name} is {value!r}: it must be a whole number from {low} to {high}")


@dataclass(frozen=True)
class LayerGrids:
    """How a linear layer is quantised: its weights by channel, its inputs by one static grid, or None: not at all."""

    weight: WeightGrid
    inputs: Activation | None

    @classmethod
    @torch.no_grad()
    def of(cls, layer: nn.Linear, packed: PackedLinear) -> LayerGrids:
        """Those that `quant.convert` found for a layer, of what it made of it."""
        weight, rows = layer.weight.detach().double(), packed.out_features
        error = (weight - packed.weight()).square().sum(1)
        nmse = float(error.sum() / weight.square().sum().clamp(min=TINY))
        grid = WeightGrid(packed.formats, packed.choice[:rows], packed.scale[:rows], error, nmse)
        return cls(grid, packed.activation)


class AdaptedLinear(nn.Module):
    """A linear layer, fake-quantised, with h adapters of rank r; only these are trained.

    gate: (h,), what each adapter counts in the next call; see `Router`.
    x: (..., K) floating; y: (..., N) float32.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, grids: LayerGrids, adapters: int, rank: int, generator: torch.Generator):
        super().__init__()
        outputs, inputs = layer.weight.shape
        self.grids = grids
        self.register_buffer("weight", layer.weight.detach().float())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())
        first = torch.randn(adapters, rank, inputs, generator=generator) / math.sqrt(inputs)
        self.down = nn.Parameter(first)
        self.up = nn.Parameter(torch.zeros(adapters, outputs, rank))
        self.gate = torch.zeros(adapters)
        self._formats = RowFormats.of(grids.weight.formats, grids.weight.choice)

    def merged(self, gate: Tensor) -> Tensor:
        """gate: (h,). Returns (N, K), not yet quantised."""
        up = (self.up * gate[:, None, None]).transpose(0, 1).flatten(1)
        return torch.addmm(self.weight, up, self.down.flatten(0, 1))

    def quantised(self, gate: Tensor) -> Tensor:
        """gate: (h,). Returns (N, K): the numbers that codes will stand for, with a straight-through gradient."""
        return quantise(self.merged(gate), self._formats, self.grids.weight.scale[:, None])

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.grids.inputs
        if inputs is not None:
            zero = torch.tensor(inputs.zero) if inputs.zero else None
            x = quantise(x, inputs.format, torch.tensor(inputs.scale), zero)
        return F.linear(x, self.quantised(self.gate), self.bias)

    @torch.no_grad()
    def packed(self, adapter: int | None) -> PackedLinear:
        """The layer with one adapter merged, or none, as codes: the same weights and inputs bit for bit."""
        gate = torch.zeros_like(self.gate)
        if adapter is not None:
            gate[adapter] = 1.0
        return pack_weight(self.merged(gate), self.bias, self.grids.weight, self.grids.inputs)


class Router(nn.Module):
    """Which adapter a step uses: a small network over the steps' embeddings, one for all layers.

    embeddings: (S, size), of each step of the sampler.
    At first equal shares of consecutive steps go to each adapter (our choice: an adapter that is never chosen has no
    gradient, so that a router that starts at random can be stuck with one).
    """

    embeddings: Tensor
    shares: Tensor

    def __init__(self, embeddings: Tensor, adapters: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        steps, size = embeddings.shape
        self.register_buffer("embeddings", embeddings.float())
        place = (torch.arange(steps) + 0.5) / steps * adapters
        self.register_buffer("shares", -SPREAD * (place[:, None] - torch.arange(adapters) - 0.5).abs())
        self.fc1, self.fc2 = nn.Linear(size, hidden), nn.Linear(hidden, adapters)
        with torch.no_grad():
            self.fc1.weight.copy_(torch.randn(hidden, size, generator=generator) / math.sqrt(size))
            for zero in (self.fc1.bias, self.fc2.weight, self.fc2.bias):
                zero.zero_()

    def logits(self) -> Tensor:
        """(S, h)."""
        return self.shares + self.fc2(F.silu(self.fc1(self.embeddings)))

    def gate(self, step: int) -> Tensor:
        """(h,): exactly 1 for the adapter of the largest logit and 0 for the others; the gradient is the softmax's."""
        share = self.logits()[step].softmax(-1)
        chosen = F.one_hot(share.argmax(), len(share))
        return chosen + (share - share.detach())

    @torch.no_grad()
    def table(self) -> list[int]:
        """Of every step its adapter."""
        return self.logits().argmax(-1).tolist()


class Talora(nn.Module):
    """A model whose linear layers are adapted, and the router of its adapters.

    model: its layers that `grids` names are replaced, in a copy; nothing else of it is trained.
    grids: name of an `nn.Linear` -> how it is quantised.  embeddings: (S, size), of the sampler's steps.
    Raises QuantError: a name that is no linear layer of the model.
    """

    def __init__(self, model: nn.Module, grids: Mapping[str, LayerGrids], config: TaloraConfig, embeddings: Tensor):
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        generator = torch.Generator().manual_seed(config.seed)
        for name, chosen in grids.items():
            layer = self.model.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                raise QuantError(f"'{name}' is a {type(layer).__name__}: only linear layers have adapters")
            adapted = AdaptedLinear(layer, chosen, config.adapters, config.rank, generator)
            self.model.set_submodule(name, adapted)
        # Of one adapter, or none, nothing is to be chosen.
        routed = config.adapters > 1
        self.router = Router(embeddings, config.adapters, config.hidden, generator) if routed else None

    def layers(self) -> dict[str, AdaptedLinear]:
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, AdaptedLinear)}

    def at(self, step: int) -> nn.Module:
        """The model as it is in a step of the sampler, until the next call; it is one object for all steps."""
        layers = list(self.layers().values())
        gate = torch.ones_like(layers[0].gate) if self.router is None else self.router.gate(step)
        for layer in layers:
            layer.gate = gate
        return self.model

    def trained(self) -> list[nn.Parameter]:
        """Adapters and router."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def table(self, steps: int) -> list[int]:
        """Of each of so many steps its adapter."""
        return [0] * steps if self.router is None else self.router.table()

    @torch.no_grad()
    def deploy(self, steps: int) -> Deployed:
        """A copy of the model with packed weights, as it is used: nothing of it can be trained."""
        self.at(0)  # a gate that has a gradient cannot be copied
        chosen = self.table(steps)
        used = sorted(set(chosen))
        model = copy.deepcopy(self.model)
        for name, layer in self.layers().items():
            adapters = used if len(layer.gate) else [None]
            model.set_submodule(name, Copies([layer.packed(adapter) for adapter in adapters]))
        return Deployed(model, [used.index(adapter) for adapter in chosen])


class Copies(nn.Module):
    """A layer as it is under each adapter that is used; `use` says which counts."""

    def __init__(self, copies: Sequence[nn.Module]) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copies)
        self.use = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.copies[self.use](x)


class Deployed:
    """A model whose layers may be `Copies`, and the table of a sampler: of every step, which of them counts."""

    def __init__(self, model: nn.Module, table: Sequence[int]) -> None:
        self.model, self.table = model, list(table)
        self._layers = [layer for layer in model.modules() if isinstance(layer, Copies)]

    def at(self, step: int) -> nn.Module:
        """See `Talora.at`."""
        for layer in self._layers:
            layer.use = self.table[step]
        return self.model

    def packed_bytes(self) -> int:
        """Of the weights of the layers that are copied: codes, scales, biases and sums, of all copies."""
        return sum(buffer.numel() * buffer.element_size() for layer in self._layers for buffer in layer.buffers())
