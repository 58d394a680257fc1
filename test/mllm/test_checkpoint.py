"""Checkpoints: a round trip, what other libraries read, how much memory loading takes, and files that lie."""

from __future__ import annotations

import json
import math
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

from mllm.actions import ActionStatistics  # noqa: E402
from mllm.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from mllm.config import OWN_TOWER, DecoderConfig, TowerConfig, VLAConfig, mini, openvla_7b  # noqa: E402
from mllm.errors import PolicyError  # noqa: E402
from mllm.hf_config import config_from_hf, config_to_hf  # noqa: E402
from mllm.tensor_file import read_header  # noqa: E402
from mllm.tokenizer import LlamaTokenizer, WordTokenizer  # noqa: E402
from mllm.vla import VLA, init_random  # noqa: E402

SMALL = VLAConfig(
    (TowerConfig(OWN_TOWER, 32, 16, 2, 2, mlp_width=24),),
    DecoderConfig(32, 48, 2, 4, 2, 400, max_position_embeddings=64),
    cameras=("a", "b"),
    vocab_padding=0,
    statistics={"toy": ActionStatistics((-1.0,) * 7, (2.0,) * 7, (True,) * 6 + (False,))},
)


@pytest.fixture(scope="module")
def model():
    return init_random(VLA(SMALL), 3)


@pytest.fixture
def folder(model, tmp_path):
    save_checkpoint(tmp_path, model, WordTokenizer())
    return tmp_path


def same(ours, theirs):
    left, right = ours.state_dict(), theirs.state_dict()
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 10_000])
def test_what_was_saved_is_loaded_bit_for_bit(model, tmp_path, shard_bytes):
    save_checkpoint(tmp_path, model, WordTokenizer(("go", "home")), shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_bytes == 10_000)
    loaded, tokenizer = load_checkpoint(tmp_path)
    assert loaded.config == SMALL
    assert same(loaded, model)
    assert tokenizer.prompt("Go home!") == [1, 3, 4]
    assert not loaded.training


def test_a_save_leaves_no_shard_of_an_earlier_one(model, tmp_path):
    save_checkpoint(tmp_path, model, WordTokenizer(), 10_000)
    save_checkpoint(tmp_path, model, WordTokenizer())
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_save_leaves_no_tokenizer_of_another_kind(tmp_path):
    model = init_random(VLA(replace(SMALL, decoder=replace(SMALL.decoder, vocab_size=30_000))), 0)
    (tmp_path / "llama.json").write_text('{"model": {"type": "WordLevel", "vocab": {"<s>": 1}, "unk_token": "<s>"}}')
    llama = LlamaTokenizer(tmp_path / "llama.json")
    for tokenizer in (WordTokenizer(), llama, WordTokenizer()):
        save_checkpoint(tmp_path, model, tokenizer)
        assert type(load_checkpoint(tmp_path)[1]) is type(tokenizer)


def test_the_safetensors_library_reads_what_we_write_and_we_read_what_it_writes(model, folder, tmp_path):
    tensors = safetensors.load_file(folder / "model.safetensors")
    names = {name for name in tensors if "q_proj" in name}
    assert names == {f"language_model.model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    stacked = torch.cat([tensors[f"language_model.model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(stacked, model.language_model.model.layers[1].mlp.gate_up_proj.weight)
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert same(load_checkpoint(folder)[0], model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "beit_base_patch16_224"])
@torch.no_grad()
def test_towers_with_tables_that_no_file_has_see_the_same_when_loaded(tmp_path, name, dtype):
    towers = TowerConfig(name, 112, 64, 3, 1), TowerConfig(name, 112, 32, 2, 1)
    model = init_random(VLA(replace(SMALL, towers=towers)), 0).to(dtype).eval()
    save_checkpoint(tmp_path, model, WordTokenizer())
    images = torch.randn(1, 2, 6, 112, 112, dtype=dtype)
    loaded, _ = load_checkpoint(tmp_path, dtype=dtype)
    assert torch.equal(loaded.visual_tokens(images), model.visual_tokens(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_arrive_in_the_type_asked_for(model, folder, dtype):
    loaded, _ = load_checkpoint(folder, dtype=dtype)
    weight = "language_model.model.layers.0.self_attn.qkv_proj.weight"
    assert torch.equal(loaded.state_dict()[weight], model.state_dict()[weight].to(dtype))
    save_checkpoint(folder, loaded, WordTokenizer())
    assert same(load_checkpoint(folder, dtype=dtype)[0], loaded)


@pytest.mark.parametrize("config", [SMALL, mini(), openvla_7b()], ids=["small", "mini", "openvla-7b"])
def test_a_configuration_survives_its_file(config):
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


PUBLISHED = {
    "architectures": ["OpenVLAForActionPrediction"],
    "arch_specifier": "no-align+fused-gelu-mlp",
    "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
    "hf_llm_id": "meta-llama/Llama-2-7b-hf",
    "image_resize_strategy": "resize-naive",
    "image_sizes": [224, 224],
    "llm_backbone_id": "llama2-7b-pure",
    "llm_max_length": 2048,
    "model_type": "openvla",
    "n_action_bins": 256,
    "norm_stats": {"bridge_orig": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}}},
    "pad_to_multiple_of": 64,
    "pad_token_id": 32000,
    "text_config": {"model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16", "vocab_size": 32064},
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "timm_override_act_layers": [None, None],
    "torch_dtype": "bfloat16",
    "use_fused_vision_backbone": True,
    "vision_backbone_id": "dinosiglip-vit-so-224px",
}


def test_the_published_configuration_is_openvla_7b():
    config = config_from_hf(PUBLISHED)
    assert set(config.statistics) == {"bridge_orig"}
    assert replace(config, statistics={}) == openvla_7b()
    assert config.action_ids == (31744, 32000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava"}, "model_type is 'llava'"),
        ({"vision_backbone_id": "eye"}, "vision_backbone_id is 'eye'"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000: .* from 1 to 256"),
        ({"text_config": {"hidden_size": "big"}}, "hidden_size is 'big'"),
        ({"text_config": {"vocab_size": 2**40}}, "vocab_size"),
        ({"text_config": {"hidden_act": "gelu"}}, "text_config.hidden_act is 'gelu'"),
        ({"text_config": {"rope_scaling": {"type": "linear"}}}, "rope_scaling"),
        ({"text_config": {"head_dim": 7}}, "head_dim is 7"),
        ({"text_config": {"rms_norm_eps": float("nan")}}, "rms_norm_eps is nan"),
        ({"text_config": None}, "'text_config' is 'None'"),
        ({"n_action_bins": -3}, "action_bins is -3"),
        ({"norm_stats": {"x": {"action": {"q01": [0.0], "q99": ["a"]}}}}, "'x': 'q99'"),
        ({"norm_stats": {"x": {"action": {"q01": [0.0], "q99": [1.0]}}}}, "1 numbers an action: it must be 7"),
        ({"norm_stats": {"x": {"action": {"q01": [1e999] * 7, "q99": [1.0] * 7}}}}, "must be finite"),
        ({"flashvla": {"run_this": "this"}}, "unknown parts: run_this"),
        ({"flashvla": {"towers": [{"name": "conv-vit", "image_size": 10**7}]}}, "image_size is 10000000"),
        (
            {"flashvla": {"towers": [{"name": "x", "mean": [0, 0, math.inf]}]}},
            r"mean is \(0, 0, inf\): .* 1000 at most",
        ),
        ({"flashvla": {"towers": [{"name": "x", "std": [1, 1, 10**400]}]}}, r"std is \(1, 1, 1000.*: .* 1000 at most"),
        ({"flashvla": {"towers": [{"wheels": 4}]}}, "does not describe a TowerConfig"),
        ({"flashvla": {"decoding": "magic"}}, "decoding is 'magic'"),
    ],
)
def test_a_wrong_configuration_is_an_error_naming_the_field(change, message):
    with pytest.raises(PolicyError, match=message):
        config_from_hf({**PUBLISHED, **change})


def rewrite(path, change):
    """Applies `change` to the tensors of a safetensors file."""
    tensors = safetensors.load_file(path)
    change(tensors)
    safetensors.save_file(tensors, path)


NORM = "language_model.model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), f"lacks '{NORM}'"),
        (lambda t: t.update(spy=torch.zeros(3)), "has unknown 'spy'"),
        (lambda t: t.update({NORM: torch.ones(33)}), rf"'{NORM}' has shape \(33,\), where .* asks for \(32,\)"),
        (lambda t: t.update({NORM: torch.ones(1, 32)}), r"has shape \(1, 32\)"),
        (lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)}), f"'{NORM}' has dtype 'I8'"),
        (lambda t: t.clear() or t.update(spy=torch.zeros(1)), "and .* more tensors"),
    ],
    ids=["missing", "extra", "misshapen", "rank", "type", "nothing right"],
)
def test_tensors_that_do_not_fit_are_an_error_naming_them(folder, change, message):
    rewrite(folder / "model.safetensors", change)
    with pytest.raises(PolicyError, match=message):
        load_checkpoint(folder)


def test_tables_that_old_versions_saved_are_left_aside(folder, model):
    rewrite(
        folder / "model.safetensors",
        lambda t: t.update({"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    )
    assert same(load_checkpoint(folder)[0], model)


def header_bytes(header, body=b""):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + body


HOSTILE = {
    "empty": (b"", "truncated"),
    "short": (b"\x01\x02", "truncated"),
    "pickle": (b"\x80\x04\x95" + b"x" * 200, "truncated, or no safetensors"),
    "zip": (b"PK\x03\x04" + b"\0" * 200, "truncated, or no safetensors|not JSON"),
    "header of 2^63 bytes": (struct.pack("<Q", 2**63) + b"{}", "truncated"),
    "header of 20 MB": (header_bytes(b" " * (20 << 20)), "at most 16777216 are read"),
    "not JSON": (header_bytes(b"{" * 64), "not JSON"),
    "nested": (header_bytes(b"[" * 1_000_000), "not JSON"),
    "not UTF-8": (header_bytes(b"\xff" * 64), "not JSON"),
    "a list": (header_bytes([1, 2]), "not a JSON object"),
    "no shape": (header_bytes({"t": {"dtype": "F32"}}), "has no dtype, shape"),
    "object dtype": (header_bytes({"t": {"dtype": "O", "shape": [1], "data_offsets": [0, 4]}}, b"1234"), "dtype 'O'"),
    "negative": (header_bytes({"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"), "shape"),
    "huge shape": (header_bytes({"t": {"dtype": "F32", "shape": [2**47] * 8, "data_offsets": [0, 4]}}), "takes"),
    "1000 dimensions": (
        header_bytes({"t": {"dtype": "F32", "shape": [1] * 1000, "data_offsets": [0, 4]}}),
        "short list",
    ),
    "beyond the end": (
        header_bytes({"t": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, b"12"),
        "truncated",
    ),
    "a hole": (
        header_bytes({"t": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"),
        "a hole or an overlap",
    ),
    "an overlap": (
        header_bytes(
            {
                "t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "u": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            },
            b"12345678",
        ),
        "a hole or an overlap",
    ),
    "bytes left over": (
        header_bytes({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345"),
        "not whole",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_an_error(folder, name):
    content, message = HOSTILE[name]
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(PolicyError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize("cut", [1, 100, 0.5])
def test_a_truncated_file_is_an_error(folder, cut):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: -cut if cut >= 1 else int(len(content) * cut)])
    with pytest.raises(PolicyError, match="truncated"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {"t": "../../secrets.safetensors"}}, "must be a .safetensors file beside it"),
        ({"weight_map": {"t": "weights.bin"}}, "must be a .safetensors file beside it"),
        ({"weight_map": {"t": "absent.safetensors"}}, "there is no .*absent.safetensors"),
        ({"weight_map": {"t": "model.safetensors"}}, "which the index places in None"),
    ],
)
def test_an_index_that_lies_is_an_error(folder, index, message):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PolicyError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "there is no .*config.json"),
        ("config.json", "[" * 100_000, "is not JSON"),
        ("config.json", "[]", "must be a JSON object"),
        ("words.json", None, "lacks its tokenizer"),
        ("words.json", '{"a": 1}', "must be a list of words"),
        ("words.json", '["a", "a"]', "different words"),
        ("words.json", "[" * 100_000, "words.json is not JSON"),
        ("words.json", "[]" + " " * (16 << 20), "words.json has 16777218 bytes: at most 16777216 are read"),
        ("words.json", json.dumps([f"w{i}" for i in range(398)]), "makes ids up to 400: the model's .* ends at 399"),
        ("dataset_statistics.json", json.dumps({"x": {"action": {"q01": [10**400], "q99": [1]}}}), "must be finite"),
        ("dataset_statistics.json", '{"x": 3}', "action statistics must be an object"),
    ],
)
def test_a_folder_with_a_wrong_part_is_an_error_naming_it(folder, name, content, message):
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(PolicyError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff{}", "tokenizer.json is not JSON, for it is not UTF-8"),
        (b"{}" + b" " * (16 << 20), "at most 16777216 are read"),
        (
            json.dumps({"model": {"type": "WordLevel", "vocab": {"<s>": 1, "go": 40_000}, "unk_token": "go"}}).encode(),
            "makes ids up to 40000: the model's vocabulary ends at 399",
        ),
    ],
    ids=["no text", "large", "ids"],
)
def test_a_wrong_tokenizer_of_llama_is_an_error_naming_its_file(folder, content, message):
    (folder / "words.json").unlink()
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(PolicyError, match=message):
        load_checkpoint(folder)


def test_a_header_that_packs_the_head_is_an_error(folder):
    path = folder / "model.safetensors"
    header = {"language_model.lm_head": {"formats": ["E2M1"], "activation": None}}
    safetensors.save_file(safetensors.load_file(path), path, metadata={"msfp": json.dumps(header)})
    with pytest.raises(PolicyError, match=r"names 'language_model.lm_head': the model reads rows of it"):
        load_checkpoint(folder)


def test_the_hub_is_asked_only_for_a_pinned_commit(tmp_path):
    with pytest.raises(PolicyError, match="needs a revision"):
        load_checkpoint("openvla/openvla-7b")
    with pytest.raises(PolicyError, match="pin a commit"):
        load_checkpoint("openvla/openvla-7b", revision="main")


# The peak of the process itself: rusage's would begin at that of the process which started it.
PEAK = """
import re, sys
from pathlib import Path
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""
MEASURE = (
    PEAK
    + """
import torch
from mllm.checkpoint import load_checkpoint
torch.set_num_threads(1)
load_checkpoint(sys.argv[2])
before = peak()
model, _ = load_checkpoint(sys.argv[1], dtype=getattr(torch, sys.argv[3]))
print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""
)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_the_weights_and_little_more(tmp_path, folder, dtype):
    big = replace(SMALL, decoder=DecoderConfig(1024, 2816, 6, 16, 16, 4096, max_position_embeddings=64))
    with torch.device("meta"):
        model = VLA(big)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    save_checkpoint(tmp_path / "big", model, WordTokenizer(), 100 << 20)
    del model
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path / "big"), str(folder), dtype]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    taken, weights = map(int, result.stdout.split())
    assert weights > 170_000_000
    assert 0.9 * weights < taken < 1.15 * weights, f"{taken / weights:.3f} times the weights"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_hostile_files_cost_little_memory(folder):
    """The largest header that is read at all is the most that a file's lies can cost."""
    lies = {"t" + "x" * 100 + str(i): {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for i in range(80_000)}
    (folder / "model.safetensors").write_bytes(header_bytes(lies, b"1234"))
    code = (
        PEAK
        + "from mllm.checkpoint import load_checkpoint\nfrom mllm.errors import PolicyError\nbefore = peak()\n"
        + "try:\n    load_checkpoint(sys.argv[1])\nexcept PolicyError as error:\n    assert 'overlap' in str(error)\n"
        + "print(peak() - before)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 400_000_000


def test_every_error_of_a_file_names_the_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(b"junk")
    with pytest.raises(PolicyError, match=re.escape(str(path))):
        read_header(path)
