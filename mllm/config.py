"""What a vision-language-action model is made of: sizes, towers, cameras and statistics; knows no tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from mllm.actions import GRIPPERS, ActionStatistics
from mllm.errors import PolicyError

Config = TypeVar("Config")
OWN_TOWER = "conv-vit"
RESIZES = ("lanczos", "area")
# Token by token; in one pass whose action slots see one another; or in one in which every position sees every other.
DECODING = ("causal", "slots", "full")
# A token for each number of an action, the numbers themselves (OpenVLA-OFT's L1 regression), or drawn from noise
# (`mllm.diffusion.head`).
HEADS = ("tokens", "regression", "diffusion")
# OpenVLA's `vision_backbone_id`: timm's names and image sizes, in the order of the features.
DINOV2, SIGLIP = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"
BACKBONES = {
    "dinosiglip-vit-so-224px": ((DINOV2, 224), (SIGLIP, 224)),
    "dinosiglip-vit-so-384px": ((DINOV2, 384), ("vit_so400m_patch14_siglip_384", 384)),
    "siglip-vit-so400m": ((SIGLIP, 224),),
    "dinov2-vit-l": ((DINOV2, 224),),
}


def check_sizes(owner: object, limits: Mapping[str, tuple[int, int]]) -> None:
    """Raises PolicyError unless every named attribute of `owner` is a whole number within its limits."""
    for name, (low, high) in limits.items():
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise PolicyError(
                f"{type(owner).__name__}.{name} is {value!r}: it must be a whole number from {low} to {high}"
            )


def check_numbers(owner: object, limits: Mapping[str, tuple[float, float]]) -> None:
    """Raises PolicyError unless every named attribute of `owner` is a number within its limits."""
    for name, (low, high) in limits.items():
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise PolicyError(
                f"{type(owner).__name__}.{name} is {value!r}: it must be a number from {low:g} to {high:g}"
            )


def check_choice(owner: object, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Raises PolicyError unless every named attribute of `owner` is one of its choices."""
    for name, allowed in choices.items():
        if getattr(owner, name) not in allowed:
            raise PolicyError(
                f"{type(owner).__name__}.{name} is {getattr(owner, name)!r}: choose one of {', '.join(allowed)}"
            )


def check_flags(owner: object, names: tuple[str, ...]) -> None:
    """Raises PolicyError unless every named attribute of `owner` is true or false."""
    for name in names:
        if not isinstance(getattr(owner, name), bool):
            raise PolicyError(f"{type(owner).__name__}.{name} is {getattr(owner, name)!r}: it must be true or false")


def changed(base: Config, value: str | Mapping[str, Any] | Config, main: str, called: str) -> Config:
    """`base`, a dataclass, with what `value` names: its field `main`, or several fields as a mapping or JSON.

    An empty text names nothing, and a whole configuration stands for itself.  called: of the option, for errors.
    Raises PolicyError: neither, an unknown field, or a wrong value.
    """
    if isinstance(value, type(base)):
        return value
    try:
        if not isinstance(value, str):
            given = dict(value)  # type: ignore[arg-type]
        elif value.lstrip().startswith("{"):
            given = json.loads(value)
        else:
            given = {main: value} if value else {}
    except (ValueError, TypeError) as error:
        raise PolicyError(f"{called} is {value!r}: it must be a {main} or a JSON object ({error})") from error
    known = [one.name for one in fields(base)]  # type: ignore[arg-type]
    if unknown := sorted(set(given) - set(known)):
        raise PolicyError(f"{called} has no setting {unknown[0]!r}; choose from {', '.join(known)}")
    return replace(base, **given)  # type: ignore[type-var]


@dataclass(frozen=True)
class ImageConfig:
    """How a camera's upright image became what the model was trained on. The defaults are OpenVLA's in LIBERO.

    mirror: left and right change places (OpenVLA turned LIBERO's raw image by 180 degrees, and raw is bottom-up).
    jpeg: a round trip through JPEG at quality 95.  resize: "lanczos" or "area", to the tower's size.
    centre_crop: the middle 90 % of the area, enlarged to the same size (the model was trained on random such crops).
    """

    mirror: bool = True
    jpeg: bool = True
    resize: str = "lanczos"
    centre_crop: bool = True

    def __post_init__(self) -> None:
        check_choice(self, {"resize": RESIZES})
        check_flags(self, ("mirror", "jpeg", "centre_crop"))


@dataclass(frozen=True)
class TowerConfig:
    """One vision transformer.

    name: a timm model, or "conv-vit" (`mllm.convvit.ConvViT`).  image_size: pixels, height and width.
    width, depth, heads, mlp_width: 0 means as timm defines them; "conv-vit" needs all four.
    mean, std: of the three colours in 0..1, subtracted from and divided out of the pixels.
    """

    name: str
    image_size: int = 224
    width: int = 0
    depth: int = 0
    heads: int = 0
    mlp_width: int = 0
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        # timm takes "hf-hub:" and "local-dir:" before a name for leave to fetch a model, or to read a folder.
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9_.\-]+", self.name):
            raise PolicyError(
                f"TowerConfig.name is {str(self.name)[:80]!r}: it must name a timm model, in letters, digits, '_', "
                f"'.' and '-', or be '{OWN_TOWER}'"
            )
        check_sizes(self, {"image_size": (8, 1024), "width": (0, 8192), "depth": (0, 128), "heads": (0, 128)})
        check_sizes(self, {"mlp_width": (0, 65536)})
        for name in ("mean", "std"):
            value = tuple(getattr(self, name))
            if len(value) != 3 or not all(isinstance(number, (int, float)) and abs(number) <= 1000 for number in value):
                raise PolicyError(
                    f"TowerConfig.{name} is {str(value)[:80]}: it must be three numbers, one a colour, of 1000 at most"
                )
            object.__setattr__(self, name, tuple(float(number) for number in value))
        if not all(number > 0 for number in self.std):
            raise PolicyError(f"TowerConfig.std is {self.std}: every number must be above 0")
        if self.name == OWN_TOWER and not (self.width and self.depth and self.heads and self.mlp_width):
            raise PolicyError(
                f"a '{OWN_TOWER}' tower needs width, depth, heads and mlp_width; timm has none of its name"
            )
        if self.name == OWN_TOWER and (self.image_size % 16 or self.width % self.heads):
            raise PolicyError(
                f"a '{OWN_TOWER}' tower of {self.image_size} pixels, width {self.width} and {self.heads} heads: "
                "the pixels must be a multiple of 16, and the width one of the heads"
            )


@dataclass(frozen=True)
class DecoderConfig:
    """A Llama decoder, in the words of Hugging Face's LlamaConfig, with its defaults (Llama-2-7B's sizes)."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    vocab_size: int = 32000
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        check_sizes(
            self,
            {
                "hidden_size": (2, 32768),
                "intermediate_size": (1, 131072),
                "num_hidden_layers": (1, 256),
                "num_attention_heads": (1, 512),
                "num_key_value_heads": (1, 512),
                "vocab_size": (2, 1 << 20),
                "max_position_embeddings": (1, 1 << 17),
            },
        )
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
                raise PolicyError(f"DecoderConfig.{name} is {value!r}: it must be a number above 0 and below 1e9")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise PolicyError(
                f"DecoderConfig.hidden_size is {self.hidden_size}: it must be a multiple of twice the "
                f"{self.num_attention_heads} attention heads, since rotary positions turn pairs"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise PolicyError(
                f"DecoderConfig.num_key_value_heads is {self.num_key_value_heads}: it must divide the "
                f"{self.num_attention_heads} attention heads"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


# Of a denoiser's layers, as many as TALoRA's adapters.
MAX_COPIES = 64


@dataclass(frozen=True)
class DiffusionConfig:
    """Of head "diffusion". times: levels of noise in training.  steps: of the sampler.  width, depth: of the denoiser;
    see `mllm.diffusion.denoiser`.
    table: of every step, which copy of the denoiser's layers it uses (`quant.talora`); empty: they have none.
    """

    times: int = 100
    steps: int = 10
    width: int = 256
    depth: int = 3
    table: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_sizes(self, {"times": (25, 10_000), "width": (2, 32768), "depth": (1, 256)})
        check_sizes(self, {"steps": (1, self.times)})
        if not isinstance(self.table, (tuple, list)) or len(self.table) not in (0, self.steps):
            raise PolicyError(
                f"DiffusionConfig.table is {str(self.table)[:80]}: it must name a copy for each of {self.steps} steps"
            )
        object.__setattr__(self, "table", tuple(self.table))
        known = all(type(copy) is int and 0 <= copy < MAX_COPIES for copy in self.table)
        if not known or set(self.table) != set(range(self.copies)):
            raise PolicyError(
                f"DiffusionConfig.table is {str(self.table)[:80]}: it must be of whole numbers from 0 up, none of them "
                f"left out, of at most {MAX_COPIES} copies"
            )

    @property
    def copies(self) -> int:
        """Of each of the denoiser's layers; 0 where they are plain ones."""
        return max(self.table, default=-1) + 1


@dataclass(frozen=True)
class VLAConfig:
    """A vision-language-action model of OpenVLA's architecture (Kim et al., arXiv 2406.09246).

    towers: one or two; their features of a patch are concatenated in this order.
    cameras: names in `Observation.images`; their visual tokens follow one another in this order.
    vocab_padding: rows of the vocabulary that only fill it up; the action tokens are the last `action_bins` ids below.
    decoding: see `DECODING`.  chunk: actions of one answer; more than one is decoded in one pass.
    head: see `HEADS`. Without tokens one slot with an embedding of its own stands for a whole action (our choice).
    diffusion: of head "diffusion"; a mapping of its fields will do.
    execute: actions of a chunk that are carried out before the model looks again.
    proprio: names in `Observation.proprio`; together they are one more token behind the visual ones.
    proprio_statistics: what brings their numbers to [-1, 1].
    render: how the images were drawn that the model was trained on, in the words of `sim.env.EnvConfig`.
    images, gripper: what the model was trained on; see `ImageConfig` and `mllm.actions.GRIPPERS`.
    statistics: data set -> how its actions were normalised; see `mllm.actions`.
    """

    towers: tuple[TowerConfig, ...]
    decoder: DecoderConfig
    cameras: tuple[str, ...] = ("agentview",)
    action_bins: int = 256
    action_dim: int = 7
    vocab_padding: int = 64
    decoding: str = "causal"
    chunk: int = 1
    head: str = "tokens"
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    execute: int = 1
    proprio: tuple[str, ...] = ()
    proprio_statistics: ActionStatistics | None = None
    render: Mapping[str, str | int] = field(default_factory=dict)
    images: ImageConfig = field(default_factory=ImageConfig)
    gripper: str = "opening"
    statistics: Mapping[str, ActionStatistics] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "towers", tuple(self.towers))
        object.__setattr__(self, "cameras", tuple(self.cameras))
        object.__setattr__(self, "proprio", tuple(self.proprio))
        if isinstance(self.diffusion, Mapping):
            object.__setattr__(self, "diffusion", DiffusionConfig(**self.diffusion))
        if not 1 <= len(self.towers) <= 2:
            raise PolicyError(f"VLAConfig.towers has {len(self.towers)}: it must be one or two")
        if len({tower.image_size for tower in self.towers}) > 1:
            sizes = ", ".join(str(tower.image_size) for tower in self.towers)
            raise PolicyError(f"the towers take images of {sizes} pixels: they must agree, as they share one image")
        if not 1 <= len(self.cameras) <= 16 or len(set(self.cameras)) != len(self.cameras):
            raise PolicyError(f"VLAConfig.cameras is {self.cameras}: it must be 1 to 16 different names")
        check_sizes(
            self, {"action_bins": (2, 65536), "action_dim": (1, 64), "vocab_padding": (0, 65536), "chunk": (1, 256)}
        )
        if self.decoder.vocab_size - self.vocab_padding <= self.action_bins:
            raise PolicyError(
                f"the vocabulary has {self.decoder.vocab_size} ids, {self.vocab_padding} of them padding: "
                f"there is no room for words before {self.action_bins} action tokens"
            )
        check_choice(self, {"decoding": DECODING, "gripper": GRIPPERS, "head": HEADS})
        if self.chunk > 1 and self.decoding == "causal":
            raise PolicyError(f"VLAConfig.chunk is {self.chunk}: more than one action needs decoding 'slots' or 'full'")
        if self.head != "tokens" and self.decoding != "slots":
            raise PolicyError(f"VLAConfig.head is '{self.head}' and decoding {self.decoding!r}: it must be 'slots'")
        check_sizes(self, {"execute": (1, self.chunk)})
        if bool(self.proprio) != (self.proprio_statistics is not None):
            raise PolicyError(
                f"VLAConfig.proprio is {self.proprio} and proprio_statistics {self.proprio_statistics}: "
                "one needs the other"
            )
        for name, statistics in self.statistics.items():
            if len(statistics.low) != self.action_dim:
                raise PolicyError(
                    f"statistics of '{name}' have {len(statistics.low)} numbers an action: it must be {self.action_dim}"
                )

    @property
    def image_size(self) -> int:
        return self.towers[0].image_size

    @property
    def token_vocab(self) -> int:
        """Ids that a tokenizer can make, action tokens included."""
        return self.decoder.vocab_size - self.vocab_padding

    @property
    def action_ids(self) -> tuple[int, int]:
        """First id of the action tokens, and one past the last."""
        return self.token_vocab - self.action_bins, self.token_vocab

    @property
    def action_tokens(self) -> int:
        """Positions that one answer takes: one for each number with head "tokens", else one for each action."""
        return self.action_dim * self.chunk if self.head == "tokens" else self.chunk


# Of the published preprocessor_config.json: ImageNet's had passed through bfloat16.
NORMALISATIONS = {
    "dinov2": ((0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def published_towers(backbone: str) -> tuple[TowerConfig, ...]:
    """The towers of one of `BACKBONES`, each with its normalisation."""
    return tuple(
        TowerConfig(name, size, mean=mean, std=std)
        for name, size in BACKBONES[backbone]
        for family, (mean, std) in NORMALISATIONS.items()
        if family in name
    )


def openvla_7b() -> VLAConfig:
    """The published OpenVLA-7B: DINOv2-L and SigLIP-So400m at 224 pixels, Llama-2-7B, one camera, 256 visual tokens."""
    return VLAConfig(published_towers("dinosiglip-vit-so-224px"), DecoderConfig(vocab_size=32064))


def _own(width: int, vision_depth: int, layers: int, vocab: int, camera_names: tuple[str, ...]) -> VLAConfig:
    """Our own small models: 64-dimensional heads, hidden layers of 8/3 of the width, rounded up to 32."""
    mlp = -(-width * 8 // 3 // 32) * 32
    heads = width // 64
    return VLAConfig(
        towers=(TowerConfig(OWN_TOWER, 128, width, vision_depth, heads, mlp_width=3 * width),),
        decoder=DecoderConfig(width, mlp, layers, heads, heads, vocab, max_position_embeddings=512, rms_norm_eps=1e-5),
        cameras=camera_names,
        vocab_padding=0,
        images=ImageConfig(mirror=False, jpeg=False, resize="area", centre_crop=False),
        gripper="command",
    )


def mini() -> VLAConfig:
    """Two cameras of 64 visual tokens, for control on a CPU."""
    return _own(192, 4, 6, 512, ("agentview", "robot0_eye_in_hand"))


def bench_100m() -> VLAConfig:
    """About a hundred million parameters and Llama's vocabulary: a size at which a CPU's memory is what limits."""
    return replace(_own(640, 6, 12, 32064, ("agentview", "robot0_eye_in_hand")), vocab_padding=64)


NAMED = {"openvla-7b": openvla_7b, "mini": mini, "bench-100m": bench_100m}


def named_config(name: str) -> VLAConfig:
    """One of `NAMED`. Raises PolicyError: no such name."""
    if name not in NAMED:
        raise PolicyError(f"no model is called '{name}'; choose one of {', '.join(NAMED)}")
    return NAMED[name]()
