"""What the experiment compares: ways to quantise a denoiser, and to fine-tune it without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mllm.diffusion.denoiser import Denoiser, sinusoids
from mllm.diffusion.schedule import Schedule
from mllm.errors import PolicyError
from quant.calibration import calibrate
from quant.config import MSFPConfig
from quant.convert import quantise_layer
from quant.dfa import DistilConfig, distil, normalised
from quant.talora import LayerGrids, Talora, TaloraConfig

# The first layers, which read what the denoiser is given, and the last. Four bits of a timestep's sines tell neighbours
# apart no more, and every step then errs alike.
ENDS = ("enter", "time1", "condition", "leave")
# Numbers of a layer's inputs that the search goes by.
SAMPLE = 1 << 14


@dataclass(frozen=True)
class Arm:
    """family: see `quant.search.FAMILIES`; "" is full precision.  adapters: "", "lora" (one), "wide" (one of as many
    weights as all of TALoRA's), or "talora".  dfa: whether the loss weighs steps by gamma.
    """

    name: str
    family: str = ""
    adapters: str = ""
    dfa: bool = False


# Those of MSFP's own ablation (arXiv 2505.21591), integers, and LoRA of TALoRA's size.
ARMS = (
    Arm("full precision"),
    Arm("INT min-max", "int-minmax"),
    Arm("INT", "int"),
    Arm("signed FP", "signed"),
    Arm("MSFP", "msfp"),
    Arm("INT + LoRA", "int", "lora"),
    Arm("signed FP + LoRA", "signed", "lora"),
    Arm("MSFP + LoRA", "msfp", "lora"),
    Arm("MSFP + LoRA of equal size", "msfp", "wide"),
    Arm("MSFP + TALoRA", "msfp", "talora"),
    Arm("MSFP + TALoRA + DFA", "msfp", "talora", dfa=True),
)


@dataclass(frozen=True)
class QuantiseConfig:
    """bits: of weights and inputs; ends: of `ENDS`.  adapters, rank: of TALoRA; LoRA has one of
    that rank, or of `adapters` times it.  distil: of every arm alike.
    """

    bits: int = 4
    ends: int = 8
    adapters: int = 2
    rank: int = 2
    distil: DistilConfig = field(default_factory=DistilConfig)

    def __post_init__(self) -> None:
        for name in ("bits", "ends"):
            if getattr(self, name) not in (4, 6, 8):
                raise PolicyError(f"QuantiseConfig.{name} is {getattr(self, name)}: choose 4, 6 or 8")


@dataclass(frozen=True)
class Subject:
    """A denoiser that the arms start from.

    model: full precision.  schedule: of its sampler.
    noise: (n, numbers), and condition, (n, condition) or None: what the sampler begins with to calibrate and distil.
    """

    model: Denoiser
    schedule: Schedule
    noise: Tensor
    condition: Tensor | None = None


@dataclass(frozen=True)
class Made:
    """The outcome of an arm.

    at: the denoiser as it is in a step of the sampler.  talora: None in full precision.  losses: of fine-tuning.
    """

    at: Callable[[int], nn.Module]
    talora: Talora | None = None
    losses: tuple[float, ...] = ()


@torch.no_grad()
def draw(at: Callable[[int], nn.Module], schedule: Schedule, noise: Tensor, condition: Tensor | None = None) -> Tensor:
    """The sampler's rows from noise, (n, numbers), by the denoiser that `at` gives for each step."""
    return schedule.sample(lambda step, x: at(step)(x, _times(schedule, step, x), condition), noise)


def _times(schedule: Schedule, step: int, x: Tensor) -> Tensor:
    return torch.full((len(x),), schedule.visited[step])


@dataclass(frozen=True)
class Prepared:
    """What all arms of a subject share: the teacher's states and answers, (steps, n, numbers), and the grids of every
    family, by layer.
    """

    states: Tensor
    answers: Tensor
    grids: dict[str, dict[str, LayerGrids]]


@torch.no_grad()
def prepare(subject: Subject, families: set[str], config: QuantiseConfig) -> Prepared:
    """Runs the full-precision sampler once, and searches grids for what its layers were given."""
    taught: list[tuple[Tensor, Tensor]] = []
    inputs = calibrate(subject.model, lambda: taught.append(teach(subject)), SAMPLE)
    least = dict.fromkeys(ENDS, (config.ends, config.ends))
    grids: dict[str, dict[str, LayerGrids]] = {}
    for family in families:
        how = MSFPConfig(config.bits, config.bits, family, least=least)
        grids[family] = {}
        for name, given in inputs.items():
            layer = subject.model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            grids[family][name] = LayerGrids.of(layer, quantise_layer(name, layer, how, given)[0])
    return Prepared(*taught[0], grids)


@torch.no_grad()
def teach(subject: Subject) -> tuple[Tensor, Tensor]:
    """The states that the full-precision model sees in each step of the sampler, and its answers to them, both (steps,
    n, numbers).
    """
    seen: list[tuple[Tensor, Tensor]] = []
    subject.schedule.sample(
        lambda step, x: subject.model(x, _times(subject.schedule, step, x), subject.condition),
        subject.noise,
        lambda step, x, found: seen.append((x, found)),
    )
    states, answers = (torch.stack(rows) for rows in zip(*seen, strict=True))
    return states, answers


def make(arm: Arm, subject: Subject, prepared: Prepared, config: QuantiseConfig, seed: int = 0) -> Made:
    """Quantises and, where the arm has adapters, fine-tunes on what the teacher saw and answered.

    seed: of the adapters' first weights and of the batches.
    """
    if not arm.family:
        return Made(lambda step: subject.model)
    count = {"": 0, "lora": 1, "wide": 1, "talora": config.adapters}[arm.adapters]
    rank = config.rank * (config.adapters if arm.adapters == "wide" else 1)
    size, how = TaloraConfig(count, rank, seed=seed), replace(config.distil, seed=seed)
    talora, losses = fine_tune(
        subject, prepared.grids[arm.family], (prepared.states, prepared.answers), size, how, arm.dfa
    )
    return Made(talora.at, talora, tuple(losses))


def fine_tune(
    subject: Subject,
    grids: Mapping[str, LayerGrids],
    taught: tuple[Tensor, Tensor],
    size: TaloraConfig,
    how: DistilConfig,
    dfa: bool,
) -> tuple[Talora, list[float]]:
    """The model quantised, with adapters that were trained where `size` has any, and the losses; not to be trained on.

    grids: of its layers, by name.  taught: of `teach`.  dfa: whether the loss weighs steps by gamma.
    """
    schedule, (states, answers) = subject.schedule, taught
    talora = Talora(subject.model, grids, size, sinusoids(torch.tensor(schedule.visited), 32))
    if not size.adapters:
        return talora, []

    def student(step: int, rows: Tensor) -> Tensor:
        x = states[step, rows]
        condition = None if subject.condition is None else subject.condition[rows]
        return talora.at(step)(x, _times(schedule, step, x), condition)

    gamma = normalised(schedule.gamma).float() if dfa else None
    losses = distil(student, answers, talora.trained(), how, gamma)
    return talora.requires_grad_(False), losses
