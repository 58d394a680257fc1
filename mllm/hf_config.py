"""`config.json` of a checkpoint: OpenVLA's published fields, and a "flashvla" part for what these cannot say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from mllm.actions import ActionStatistics
from mllm.config import BACKBONES, DecoderConfig, DiffusionConfig, ImageConfig, TowerConfig, VLAConfig, published_towers
from mllm.errors import PolicyError

MAX_JSON = 16 << 20
CONFIG, STATISTICS = "config.json", "dataset_statistics.json"
# Checkpoints that come with the package.
WEIGHTS = Path(__file__).resolve().parent / "weights"
# What a Llama configuration may say only in this way, as the decoder knows no other.
FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_scaling": None,
}
PLAIN = ("action_dim", "decoding", "chunk", "head", "execute", "gripper")
OWN = ("towers", "cameras", "vocab_padding", "proprio", "proprio_statistics", "render", "images", "diffusion", *PLAIN)


def read_text(path: Path) -> str:
    """What a file of at most 16 MiB says. Raises PolicyError: no such file, too large, or not UTF-8."""
    if not path.is_file():
        raise PolicyError(f"there is no {path}")
    if path.stat().st_size > MAX_JSON:
        raise PolicyError(f"{path} has {path.stat().st_size} bytes: at most {MAX_JSON} are read")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path} is not JSON, for it is not UTF-8: {error}") from error


def read_any(path: Path) -> Any:
    """What JSON of at most 16 MiB stands for. Raises PolicyError: no such file, too large, or not JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"{path} is not JSON: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; see `read_any`."""
    read = read_any(path)
    if not isinstance(read, dict):
        raise PolicyError(f"{path} holds a {type(read).__name__}: it must be a JSON object")
    return read


def load_config(folder: Path) -> VLAConfig:
    """The configuration of a checkpoint, with the statistics of its data set file where it has one."""
    config = config_from_hf(read_json(folder / CONFIG), str(folder / CONFIG))
    path = folder / STATISTICS
    if not path.is_file():
        return config
    try:
        return replace(config, statistics=statistics_from_hf(read_json(path), str(path)))
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from error


def part(mapping: Mapping[str, Any], key: str, kind: type, where: str, default: Any = None) -> Any:
    """mapping[key] of that kind, or the default where it is absent. Raises PolicyError saying where."""
    value = mapping.get(key, default)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise PolicyError(f"{where}: '{key}' is {str(value)[:80]!r}: it must be of type {kind.__name__}")
    return value


def config_from_hf(config: Mapping[str, Any], where: str = "config.json") -> VLAConfig:
    """A model from the contents of a `config.json`. Raises PolicyError naming the field that is wrong."""
    if config.get("model_type") not in ("openvla", "flashvla"):
        raise PolicyError(f"{where}: model_type is {str(config.get('model_type'))[:80]!r}: it must be 'openvla'")
    own = part(config, "flashvla", dict, where, {})
    unknown = sorted(set(own) - set(OWN))
    if unknown:
        raise PolicyError(f"{where}: 'flashvla' has unknown parts: {', '.join(unknown)[:200]}")
    padding = part(own, "vocab_padding", int, where, part(config, "pad_to_multiple_of", int, where, 64))
    given: dict[str, Any] = {key: own[key] for key in PLAIN if key in own}
    for key in ("cameras", "proprio"):
        if key in own:
            given[key] = tuple(str(name) for name in part(own, key, list, where))
    if own.get("proprio_statistics") is not None:
        given["proprio_statistics"] = ActionStatistics.from_json(f"{where}: proprio", own["proprio_statistics"])
    if "render" in own:
        render = part(own, "render", dict, where)
        if not all(type(value) in (str, int) for value in render.values()):
            raise PolicyError(f"{where}: 'render' is {str(render)[:80]}: its values must be text or whole numbers")
        given["render"] = render
    if "images" in own:
        given["images"] = _build(ImageConfig, part(own, "images", dict, where), where)
    if "diffusion" in own:
        given["diffusion"] = _build(DiffusionConfig, part(own, "diffusion", dict, where), where)
    towers = (
        tuple(_build(TowerConfig, tower, where) for tower in part(own, "towers", list, where))
        if "towers" in own
        else _published_towers(config, where)
    )
    try:
        return VLAConfig(
            towers,
            decoder_from_hf(part(config, "text_config", dict, where), where),
            action_bins=part(config, "n_action_bins", int, where, 256),
            vocab_padding=padding,
            statistics=statistics_from_hf(part(config, "norm_stats", dict, where, {}), where),
            **given,
        )
    except PolicyError as error:
        raise PolicyError(f"{where}: {error}") from error


def _build(kind: type, values: Any, where: str) -> Any:
    """A dataclass from a JSON object; lists become tuples."""
    if not isinstance(values, Mapping) or not set(values) <= {field.name for field in fields(kind)}:
        raise PolicyError(f"{where}: {str(values)[:120]} does not describe a {kind.__name__}")
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except (PolicyError, TypeError) as error:
        raise PolicyError(f"{where}: {error}") from error


def _published_towers(config: Mapping[str, Any], where: str) -> tuple[TowerConfig, ...]:
    name = part(config, "vision_backbone_id", str, where)
    if name not in BACKBONES:
        raise PolicyError(f"{where}: vision_backbone_id is {name[:80]!r}: choose one of {', '.join(BACKBONES)}")
    return published_towers(name)


def decoder_from_hf(text: Mapping[str, Any], where: str) -> DecoderConfig:
    """From a `text_config`; what it leaves out is as in transformers' LlamaConfig, as the published code has it."""
    for key, value in FIXED.items():
        if text.get(key, value) != value:
            raise PolicyError(
                f"{where}: text_config.{key} is {str(text[key])[:80]!r}: the decoder knows {value!r} only"
            )
    names = {field.name for field in fields(DecoderConfig)}
    given = {key: value for key, value in text.items() if key in names}
    rope = text.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or rope.get("rope_type", "default") != "default":
        raise PolicyError(f"{where}: text_config.rope_parameters is {str(rope)[:80]}: the decoder knows 'default' only")
    if "rope_theta" in rope:
        given.setdefault("rope_theta", rope["rope_theta"])
    # Without a number of their own, keys and values have as many heads as the queries.
    given.setdefault("num_key_value_heads", given.get("num_attention_heads", 32))
    try:
        decoder = DecoderConfig(**given)
    except PolicyError as error:
        raise PolicyError(f"{where}: text_config: {error}") from error
    if text.get("head_dim") not in (None, decoder.head_dim):
        raise PolicyError(
            f"{where}: text_config.head_dim is {text['head_dim']}: the decoder knows {decoder.head_dim} only"
        )
    return decoder


def statistics_from_hf(norm_stats: Mapping[str, Any], where: str) -> dict[str, ActionStatistics]:
    """`norm_stats` of a config.json, or the contents of a dataset_statistics.json."""
    return {
        str(name): ActionStatistics.from_json(
            f"{where}: '{str(name)[:80]}'", entry.get("action") if isinstance(entry, Mapping) else None
        )
        for name, entry in norm_stats.items()
    }


def statistics_to_hf(config: VLAConfig) -> dict[str, Any]:
    return {name: {"action": statistics.to_json()} for name, statistics in config.statistics.items()}


def config_to_hf(config: VLAConfig) -> dict[str, Any]:
    """The inverse of `config_from_hf`. OpenVLA's fields are all there, so that its readers find what they know."""
    names = {towers: name for name, towers in BACKBONES.items()}
    backbone = names.get(tuple((tower.name, tower.image_size) for tower in config.towers), "flashvla")
    decoder = asdict(config.decoder)
    return {
        "model_type": "openvla",
        "architectures": ["OpenVLAForActionPrediction"],
        "arch_specifier": "no-align+fused-gelu-mlp" if len(config.towers) > 1 else "no-align+gelu-mlp",
        "vision_backbone_id": backbone,
        "use_fused_vision_backbone": len(config.towers) > 1,
        "timm_model_ids": [tower.name for tower in config.towers],
        "timm_override_act_layers": [None for _ in config.towers],
        "image_sizes": [tower.image_size for tower in config.towers],
        "image_resize_strategy": "resize-naive",
        "llm_backbone_id": "llama2-7b-pure",
        "llm_max_length": config.decoder.max_position_embeddings,
        "pad_to_multiple_of": config.vocab_padding,
        "n_action_bins": config.action_bins,
        "text_config": {**FIXED, **decoder},
        "norm_stats": statistics_to_hf(config),
        "flashvla": {
            "towers": [asdict(tower) for tower in config.towers],
            "cameras": list(config.cameras),
            "vocab_padding": config.vocab_padding,
            "proprio": list(config.proprio),
            "proprio_statistics": config.proprio_statistics and config.proprio_statistics.to_json(),
            "render": dict(config.render),
            "images": asdict(config.images),
            **({"diffusion": asdict(config.diffusion)} if config.head == "diffusion" else {}),
            **{key: getattr(config, key) for key in PLAIN},
        },
    }
