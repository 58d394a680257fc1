"""LLaVA-1.5 (Liu et al., arXiv 2310.03744) on our decoder, from a checkpoint as transformers saves it.

CLIP's tower is transformers' own, without the layers that LLaVA does not look at; projector and decoder are ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.checkpoint import check_dtype, check_tensors, fill, find_folder, find_tensors
from mllm.config import DecoderConfig, check_choice, check_sizes
from mllm.decoder import LanguageModel
from mllm.errors import PolicyError
from mllm.hf_config import CONFIG, decoder_from_hf, part, read_json
from mllm.kernels import Linear
from mllm.tensor_names import Place, places
from mllm.torchvision_import import import_beside_torchvision

GENERATION = "generation_config.json"
# What a LLaVA configuration may say only in this way; each is what LLaVA-1.5 says, or leaves to transformers' default.
FIXED = {
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}
FIXED_VISION = {"model_type": "clip_vision_model", "num_channels": 3}


@dataclass(frozen=True)
class ClipConfig:
    """CLIP's vision transformer, in the words of Hugging Face's CLIPVisionConfig and with its defaults.

    image_size, patch_size: pixels.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_sizes(self, {"hidden_size": (1, 8192), "intermediate_size": (1, 65536), "num_hidden_layers": (1, 128)})
        check_sizes(self, {"num_attention_heads": (1, 128), "image_size": (1, 2048)})
        check_sizes(self, {"patch_size": (1, self.image_size)})
        check_choice(self, {"hidden_act": ("quick_gelu", "gelu")})
        eps = self.layer_norm_eps
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < 1:
            raise PolicyError(f"ClipConfig.layer_norm_eps is {eps!r}: it must be a number between 0 and 1")
        if self.hidden_size % self.num_attention_heads:
            raise PolicyError(
                f"ClipConfig.hidden_size is {self.hidden_size}: it must be a multiple of the "
                f"{self.num_attention_heads} attention heads"
            )

    @property
    def patches(self) -> int:
        """Visual tokens of an image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class LlavaConfig:
    """A LLaVA-1.5, in the words of Hugging Face's LlavaConfig.

    vision_feature_layer: which of the tower's hidden states is looked at; the first, 0, is its embeddings.
    image_token_index: the id that stands for a visual token in a prompt.
    stop: ids that end an answer.
    """

    clip: ClipConfig
    decoder: DecoderConfig
    vision_feature_layer: int = -2
    image_token_index: int = 32000
    stop: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        depth = self.clip.num_hidden_layers
        check_sizes(self, {"vision_feature_layer": (-depth, depth)})
        check_sizes(self, {"image_token_index": (0, self.decoder.vocab_size - 1)})

    @property
    def clip_layers(self) -> int:
        """How many of the tower's layers are run."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.clip.num_hidden_layers + 1 + layer


def llava_config(folder: Path) -> LlavaConfig:
    """From a checkpoint's config.json and generation_config.json. Raises PolicyError naming the field that is wrong."""
    where = str(folder / CONFIG)
    config = read_json(folder / CONFIG)
    check_fixed(config, FIXED, where)
    vision, text = part(config, "vision_config", dict, where), part(config, "text_config", dict, where)
    check_fixed(vision, FIXED_VISION, f"{where}: vision_config")
    known = {field.name for field in fields(ClipConfig)}
    try:
        clip = ClipConfig(**{key: value for key, value in vision.items() if key in known})
        return LlavaConfig(
            clip,
            decoder_from_hf(text, where),
            part(config, "vision_feature_layer", int, where, -2),
            part(config, "image_token_index", int, where, 32000),
            stop_ids(folder, text),
        )
    except PolicyError as error:
        raise PolicyError(f"{where}: {error}") from error


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise PolicyError(f"{where}: {key} is {str(config[key])[:80]!r}: LLaVA-1.5 has {value!r}")


def stop_ids(folder: Path, text: Mapping[str, Any]) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, else of the text_config, else Llama's."""
    path = folder / GENERATION
    said = read_json(path).get("eos_token_id") if path.is_file() else None
    said = text.get("eos_token_id", 2) if said is None else said
    ids = said if isinstance(said, list) else [said]
    if not all(type(number) is int for number in ids):
        raise PolicyError(f"eos_token_id is {str(said)[:80]}: it must be a token's id, or a list of such")
    return tuple(ids)


def make_clip(config: ClipConfig, layers: int) -> nn.Module:
    """transformers' CLIPVisionModel with only its first `layers` layers."""
    transformers = import_beside_torchvision("transformers")
    given = {field.name: getattr(config, field.name) for field in fields(config)}
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**{**given, "num_hidden_layers": layers}))


class Projector(nn.Module):
    """Features to embeddings, under transformers' names."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = Linear(width, hidden)
        self.linear_2 = Linear(hidden, hidden)

    def forward(self, features: Tensor) -> Tensor:
        """features: (n, N, width). Returns (n, N, hidden)."""
        return self.linear_2(F.gelu(self.linear_1(features)))


@dataclass(frozen=True)
class Prompt:
    """hidden: (B, P, d).  positions: (B or 1, P).  valid: (B, P), or None where nothing is padding.
    visual: (B, P) bool, where visual tokens stand.

    Shorter prompts are padded in front, so that every sample's last token stands last.
    """

    hidden: Tensor
    positions: Tensor
    valid: Tensor | None
    visual: Tensor


class Llava(nn.Module):
    """Images and text in; `language_model` answers."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = make_clip(config.clip, config.clip_layers)
        self.multi_modal_projector = Projector(config.clip.hidden_size, config.decoder.hidden_size)
        self.language_model = LanguageModel(config.decoder)

    @property
    def device(self) -> torch.device:
        return self.language_model.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.embed_tokens.weight.dtype

    def visual_tokens(self, pixels: Tensor) -> Tensor:
        """pixels: (n, 3, S, S) of n images, normalised. Returns (n, N, hidden): CLIP's class token is left out."""
        features = self.vision_tower(pixels).last_hidden_state  # before the tower's last norm
        return self.multi_modal_projector(features[:, 1:])

    def prompt(self, visual: Tensor | None, texts: Sequence[Sequence[int]], room: int = 0) -> Prompt:
        """visual: (n, N, hidden), in the order in which the samples use them; None without images.
        texts: a list of ids a sample, with `image_token_index` N times where an image stands.
        room: tokens that shall fit behind the prompt.

        Raises PolicyError: no text, places and images that do not match, or more positions than the model has.
        """
        ids, limit = self.config.image_token_index, self.config.decoder.max_position_embeddings
        lengths = [len(text) for text in texts]
        longest, shortest = max(lengths, default=0), min(lengths, default=0)
        if not shortest:
            raise PolicyError(f"texts of {lengths} tokens were given: there must be at least one, and none empty")
        if longest + room > limit:
            raise PolicyError(
                f"the prompt has {longest} tokens and the answer may have {room}: the model has {limit} positions; "
                "shorten the question, or ask for a shorter answer"
            )
        padded = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts], device=self.device)
        places = torch.arange(longest, device=self.device)[None]
        missing = longest - torch.tensor(lengths, device=self.device)[:, None]
        real = places >= missing
        mask = (padded == ids) & real
        wanted, given = int(mask.sum()), 0 if visual is None else visual.shape[:2].numel()
        if wanted != given:
            raise PolicyError(
                f"the prompt has room for {wanted} visual tokens, and the images make {given}: "
                f"an image needs <image> once in the text, which stands for {self.config.clip.patches}"
            )
        hidden = self.language_model.model.embed_tokens(padded)
        if visual is not None:
            hidden = hidden.masked_scatter(mask[..., None], visual.to(hidden.dtype))
        if shortest == longest:
            return Prompt(hidden, places, None, mask)
        return Prompt(hidden, (places - missing).clamp(min=0), real, mask)


def load_llava(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> Llava:
    """A model in evaluation mode; arguments and errors are those of `mllm.checkpoint.load_checkpoint`.

    Reads every layout that transformers has given these tensors: see `published`.
    """
    check_dtype(dtype)
    folder = find_folder(source, revision)
    config = llava_config(folder)
    files = find_tensors(folder)
    with torch.device("meta"):
        model = Llava(config).to(dtype).eval()
    named = by_published_name(files, folder)
    ours = places(list(model.state_dict()), config.decoder)
    wanted: dict[str, Place] = {named.pop(published(name), published(name)): place for name, place in ours}
    unused = {file for name, file in named.items() if is_unused(name, config)}
    check_tensors(folder, wanted, model.state_dict(), {name: files[name] for name in files if name not in unused})
    model.to_empty(device=device)
    fill(model, wanted, files)
    # CLIP's only buffer, which no file has: the number of each patch.
    for buffer in model.vision_tower.buffers():
        buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
    return model.requires_grad_(False)


def published(name: str) -> str:
    """A tensor's name as LLaVA-1.5 was published, whichever version of transformers wrote it.

    "language_model.model.layers", "language_model.lm_head" and "vision_tower.vision_model" were the first layout; then
    came "model.language_model.layers", "lm_head" and "model.vision_tower.vision_model"; the newest leaves
    "vision_model" out.
    """
    if name == "lm_head.weight":
        return f"language_model.{name}"
    if name.startswith("model."):
        name = name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def by_published_name(names: Iterable[str], folder: Path) -> dict[str, str]:
    """Published name -> name in the file. Raises PolicyError: a tensor that is there twice."""
    named: dict[str, str] = {}
    for name in names:
        other = named.setdefault(published(name), name)
        if other != name:
            raise PolicyError(f"the checkpoint in {folder} holds one tensor twice, as '{other}' and as '{name}'")
    return named


def is_unused(name: str, config: LlavaConfig) -> bool:
    """Whether a tensor, by its published name, is of a layer that is not run, or a table that is computed."""
    layer = re.match(r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.", name)
    if layer:
        return config.clip_layers <= int(layer[1]) < config.clip.num_hidden_layers
    return name.endswith((".rotary_emb.inv_freq", "vision_model.embeddings.position_ids"))
