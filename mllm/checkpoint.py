"""Checkpoints in Hugging Face's layout: a folder with config.json, safetensors, the tokenizer and the statistics.

No file in it is executed or unpickled, and a folder that says something wrong costs an error, not memory: the
configuration's shapes are compared with the files' headers before a weight is allocated. Layers that are quantised
(`quant.checkpoint`) are never there in full precision.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm.errors import PolicyError
from mllm.hf_config import CONFIG, STATISTICS, config_to_hf, load_config, read_json, statistics_to_hf
from mllm.tensor_file import FLOATS, Entry, read_header, read_into, read_metadata, write_tensors
from mllm.tensor_names import Place, places
from mllm.tokenizer import TOKENIZERS, Tokenizer, load_tokenizer
from mllm.vision import compute_buffers
from mllm.vla import VLA
from quant.checkpoint import HEADER, expect_, headers, read_headers, stored_tensors, unpack_
from quant.errors import QuantError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 << 30
# The one linear layer that is not called, but of whose weights rows are read.
UNPACKED = "language_model.lm_head"
# Tables that older versions of transformers saved, and every version computes.
IGNORED = re.compile(r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def load_checkpoint(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> tuple[VLA, Tokenizer]:
    """A model in evaluation mode, and its tokenizer.

    source: a folder, or with a revision the "owner/name" of a Hugging Face repository.
    dtype, device: each tensor goes there straight from the file, so that at most one is in memory twice.
    revision: the 40 digits of a commit, so that the same call means the same weights.
    Raises PolicyError: anything missing, extra, misshapen, truncated or hostile, by name.
    """
    check_dtype(dtype)
    folder = find_folder(source, revision)
    config = load_config(folder)
    tokenizer = load_tokenizer(folder, config.decoder.vocab_size)
    files = find_tensors(folder)
    with torch.device("meta"):
        model = VLA(config).to(dtype).eval()
    try:
        expect_(model, find_packed(files))
        wanted = dict(places(list(model.state_dict()), config.decoder))
        check_tensors(folder, wanted, model.state_dict(), files)
        model.to_empty(device=device)
        fill(model, wanted, files)
        compute_buffers(model.vision_backbone, config)
        unpack_(model)
    except QuantError as error:
        raise PolicyError(f"the checkpoint in {folder}: {error}") from error
    return model.requires_grad_(False), tokenizer


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in FLOATS.values():
        raise PolicyError(f"a model cannot be loaded as {dtype}: choose float32, bfloat16, float16 or float64")


def find_folder(source: str | Path, revision: str | None) -> Path:
    """The folder `source`, or that of a repository's files. Raises PolicyError: there is none."""
    folder = Path(source) if revision is None else download(str(source), revision)
    if not folder.is_dir():
        raise PolicyError(f"there is no folder {folder}; a Hugging Face repository needs a revision")
    return folder


def find_tensors(folder: Path) -> dict[str, tuple[Path, Entry]]:
    """Every tensor's name, file and place. Raises PolicyError: no weights, or an index and files that disagree."""
    if not (folder / INDEX).is_file():
        return {name: (folder / SINGLE, entry) for name, entry in read_header(folder / SINGLE).items()}
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise PolicyError(f"{folder / INDEX} has no weight_map from tensors to files")
    found: dict[str, tuple[Path, Entry]] = {}
    for name in sorted(set(index.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise PolicyError(f"{folder / INDEX} names file {name[:120]!r}: it must be a .safetensors file beside it")
        for tensor, entry in read_header(folder / name).items():
            if index.get(tensor) != name:
                raise PolicyError(f"{folder / name} holds '{tensor}', which the index places in {index.get(tensor)}")
            found[tensor] = (folder / name, entry)
    absent = sorted(set(index) - set(found))
    if absent:
        raise PolicyError(f"{folder / INDEX} places {shorten(absent)} in files that lack them")
    return found


def find_packed(files: Mapping[str, tuple[Path, Entry]]) -> dict[str, Any]:
    """What the files' headers say of layers that are quantised.

    Raises QuantError: two speak of one layer, or one of a layer that cannot be.
    """
    found: dict[str, Any] = {}
    for path in sorted({path for path, _ in files.values()}):
        layers = read_headers(read_metadata(path).get(HEADER, "{}"))
        if twice := sorted(set(layers) & set(found)):
            raise QuantError(f"layer '{twice[0][:120]}' is in the header of two files")
        found |= layers
    if UNPACKED in found:
        raise QuantError(f"the header '{HEADER}' names '{UNPACKED}': the model reads rows of it, so store it unpacked")
    return found


def check_tensors(
    folder: Path,
    wanted: Mapping[str, Place],
    shapes: dict[str, Tensor],
    files: Mapping[str, tuple[Path, Entry]],
) -> None:
    """Raises PolicyError unless the files hold the wanted tensors, in their shapes, floating-point numbers where these
    are wanted, and nothing else.
    """
    missing = sorted(set(wanted) - set(files))
    extra = sorted(name for name in set(files) - set(wanted) if not IGNORED.fullmatch(name))
    if missing or extra:
        parts = [f"lacks {shorten(missing)}"] * bool(missing) + [f"has unknown {shorten(extra)}"] * bool(extra)
        raise PolicyError(f"the checkpoint in {folder} {', and '.join(parts)}: it does not fit its {CONFIG}")
    for name, place in wanted.items():
        tensor, (path, entry) = place.of(shapes), files[name]
        shape = tuple(tensor.shape)
        if entry.shape != shape:
            raise PolicyError(f"{path}: tensor '{name}' has shape {entry.shape}, where {CONFIG} asks for {shape}")
        if entry.dtype.is_floating_point != tensor.is_floating_point():
            raise PolicyError(f"{path}: tensor '{name}' is {entry.dtype}, where {tensor.dtype} is asked for")


def shorten(names: list[str], most: int = 8) -> str:
    """The names, or the first of them and how many more there are."""
    shown = ", ".join(f"'{name[:120]}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more tensors"


@torch.no_grad()
def fill(model: nn.Module, wanted: Mapping[str, Place], files: Mapping[str, tuple[Path, Entry]]) -> None:
    """Reads every wanted tensor into the model, file by file in the order of their bytes."""
    tensors = model.state_dict()
    for path in sorted({path for path, _ in files.values()}):
        own = sorted((files[name][1].begin, name) for name in wanted if files[name][0] == path)
        # Unbuffered: the bytes go to the tensor and nowhere else.
        with path.open("rb", buffering=0) as file:
            for _, name in own:
                read_into(file, files[name][1], wanted[name].of(tensors))


def save_checkpoint(folder: str | Path, model: VLA, tokenizer: Tokenizer, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a folder that `load_checkpoint` reads, under OpenVLA's published names; what is there is replaced.

    The published names of projections that we stack are of their weights; stacked ones that are quantised stay so.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("model*.safetensors"), *(folder / name for name in (INDEX, *TOKENIZERS))):
        old.unlink(missing_ok=True)
    config = model.config
    write_json(folder / CONFIG, config_to_hf(config))
    write_json(folder / STATISTICS, statistics_to_hf(config))
    tokenizer.save(folder)
    tensors, packed = stored_tensors(model), headers(model)
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, place in places(list(tensors), config.decoder):
        tensor = place.of(tensors)
        size = tensor.numel() * tensor.element_size()
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= size
    if len(shards) == 1:
        write_shard(folder / SINGLE, shards[0], packed)
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_shard(folder / name, shard, packed)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def replace_checkpoint(folder: Path, model: VLA, tokenizer: Tokenizer) -> None:
    """`save_checkpoint` beside `folder`, and then in its place: a full disk or a kill leaves the old one, and a kill
    between two renames none. Raises OSError: it cannot be written.
    """
    new, old = (folder.with_name(f".{folder.name}.{age}") for age in ("new", "old"))
    for left_by_a_kill in (new, old):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    try:
        save_checkpoint(new, model, tokenizer)
        for path in new.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise OSError(error.errno, f"{error.strerror or error}: {folder} was not written") from error
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_shard(path: Path, tensors: Mapping[str, Tensor], packed: Mapping[str, Any]) -> None:
    """packed: what the header says of every quantised layer; that goes to the file with the layer's codes."""
    own = {name: header for name, header in packed.items() if f"{name}.codes" in tensors}
    write_tensors(path, tensors, {HEADER: json.dumps(own)} if own else None)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def download(repository: str, revision: str) -> Path:
    """Fetches a Hugging Face repository at one commit: JSON, tokenizer and safetensors, no code. Returns its folder.

    Raises PolicyError: not a commit, or huggingface_hub is not installed or fails.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise PolicyError(f"revision is {revision[:80]!r}: pin a commit by its 40 digits, as a branch or tag can move")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise PolicyError(f"fetching '{repository}' needs huggingface_hub: pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise PolicyError(f"'{repository}' at {revision} cannot be fetched: {error}") from error
