"""What a training run is made of, read from a YAML file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from mllm.config import NAMED, check_choice
from mllm.errors import PolicyError

# Path -> range of a number, inclusive.
LIMITS: dict[str, tuple[float, float]] = {
    "steps": (1, 10**9),
    "batch": (1, 65536),
    "seed": (0, 2**32 - 1),
    "warmup": (0, 10**9),
    "muon_rate": (0, 1),
    "adamw_rate": (0, 1),
    "final_rate": (0, 1),
    "weight_decay": (0, 10),
    "clip": (1e-6, 1e6),
    "ema": (0, 0.999999),
    "smoothing": (0, 64),
    "gripper_weight": (0, 100),
    "target_weight": (0, 100),
    "phase_weight": (0, 100),
    "pointing_weight": (0, 100),
    "shift": (0, 64),
    "jitter": (0, 1),
    "proprio_noise": (0, 1),
    "thin_share": (0, 1),
    "validation": (0, 0.5),
    "checkpoint_seconds": (1, 86400),
    "log_seconds": (0.1, 3600),
    "threads": (1, 1024),
    "lora_rank": (0, 1024),
}


@dataclass(frozen=True)
class TrainConfig:
    """One run. Everything random in it follows from `seed` and the step's number, so that it can go on anywhere.

    name: of the run; its folder is `<runs>/<name>`.
    data: folders of demonstrations (`mllm.demonstrations`).
    model: one of `mllm.config.NAMED`, for random weights.  init: a checkpoint's folder to start from instead.
    change: fields of `VLAConfig` that replace the model's own, such as {"decoding": "slots", "chunk": 8}.
    steps: of the optimiser.  batch: samples a step, over all devices.
    muon_rate, adamw_rate: learning rates of matrices in layers (Muon) and of everything else (AdamW); they rise for
        `warmup` steps and fall by half a cosine to `final_rate` of themselves.  clip: of the gradient's norm.
    ema: decay of the averaged weights, which are what a checkpoint ships.
    smoothing: bins, the spread of a label over its neighbours; of action tokens only.
    gripper_weight: of the gripper's number in the loss, where each of the others counts 1.
    target_weight, phase_weight, pointing_weight: of the auxiliary losses, which read privileged state: where to grasp
        and to put, what the expert is doing, and what words attend to (`mllm.training.pointing`).
    phase_weights: phase -> how much more often its frames are drawn.
    source_weights: a demonstration's source ("expert", "dagger") -> how much more often its frames are drawn.
    shift: pixels by which images are moved at random.  jitter: largest change of brightness and contrast.
    thin_share: of the steps, in which the decoder goes on with fewer visual tokens (`mllm.training.thinning`).
    proprio_noise: spread of what is added to proprioception, in its normalised units.
    validation: share of the episodes that are held out.
    precision: "float32" or "bfloat16" (matrix products only; weights stay float32), or "auto": bfloat16 where the
        processor has instructions for it, else float32. A run goes on in the precision that it began in.
    frozen: modules of the model by name, such as "vision_backbone", that stay as `init` has them.
    lora_rank: 0 trains every weight; above, low-rank adapters of the decoder alone, merged into what is shipped.
    checkpoint_seconds, log_seconds: between checkpoints, and between lines of progress.
    """

    name: str
    data: tuple[str, ...]
    model: str = "mini"
    init: str = ""
    change: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 10_000
    batch: int = 32
    seed: int = 0
    warmup: int = 100
    muon_rate: float = 0.006
    adamw_rate: float = 7e-4
    final_rate: float = 0.02
    weight_decay: float = 0.01
    clip: float = 5.0
    ema: float = 0.998
    smoothing: float = 3.0
    gripper_weight: float = 1.0
    target_weight: float = 1.0
    phase_weight: float = 0.1
    pointing_weight: float = 0.5
    phase_weights: Mapping[str, float] = field(default_factory=dict)
    source_weights: Mapping[str, float] = field(default_factory=dict)
    shift: int = 0
    jitter: float = 0.1
    proprio_noise: float = 0.02
    thin_share: float = 0.0
    validation: float = 0.02
    precision: str = "auto"
    device: str = "cpu"
    threads: int = 2
    frozen: tuple[str, ...] = ()
    lora_rank: int = 0
    checkpoint_seconds: float = 120.0
    log_seconds: float = 20.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or Path(self.name).name != self.name:
            raise PolicyError(f"TrainConfig.name is {self.name!r}: it must be a folder's name")
        data = (self.data,) if isinstance(self.data, str) else tuple(self.data)
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "frozen", (self.frozen,) if isinstance(self.frozen, str) else tuple(self.frozen))
        if not data or not all(isinstance(folder, str) and folder for folder in data):
            raise PolicyError(f"TrainConfig.data is {self.data!r}: it must name one folder of demonstrations or more")
        if not all(isinstance(name, str) and name for name in self.frozen):
            raise PolicyError(f"TrainConfig.frozen is {self.frozen!r}: it must be names of modules")
        if not self.init and self.model not in NAMED:
            raise PolicyError(f"TrainConfig.model is {self.model!r}: choose one of {', '.join(NAMED)}, or give init")
        check_choice(self, {"precision": ("auto", "float32", "bfloat16"), "device": ("cpu", "cuda")})
        whole = {item.name for item in fields(self) if item.type == "int"}
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            kind = int if name in whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                what = "a whole number" if name in whole else "a number"
                raise PolicyError(f"TrainConfig.{name} is {value!r}: it must be {what} from {low} to {high}")
        for name in ("phase_weights", "source_weights"):
            for key, weight in getattr(self, name).items():
                if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1000:
                    raise PolicyError(f"TrainConfig.{name}: {key!r} has {weight!r}: it must be from 0 to 1000")

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products. Raises KeyError: the precision is not resolved."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.precision]

    def resolved(self, began: str | None = None) -> TrainConfig:
        """With a precision in place of "auto": what the run began in, or what suits this processor."""
        if self.precision != "auto":
            return self
        fast = self.device == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return replace(self, precision=began or ("bfloat16" if fast else "float32"))

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def read_train_config(path: Path) -> TrainConfig:
    """Reads a YAML file with the fields of `TrainConfig`. Raises PolicyError naming the file and the field."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PolicyError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise PolicyError(f"{path} must be a mapping of TrainConfig's fields")
    known = {item.name for item in fields(TrainConfig)}
    unknown = sorted(str(key) for key in set(values) - known)
    if unknown:
        raise PolicyError(f"{path} has unknown fields: {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    try:
        return TrainConfig(**values)
    except (PolicyError, TypeError) as error:
        raise PolicyError(f"{path}: {error}") from error
