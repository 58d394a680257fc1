"""`flashvla quantize` writes a checkpoint that other commands run, and says what became of every layer."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")

from flashvla_ros.cli import main
from mllm.policy import make_policy
from mllm.vla_policy import VLAPolicy
from quant.formats import FloatFormat
from quant.packed import PackedLinear


@pytest.fixture
def quantize(tiny, demonstrations, tmp_path):
    def run(*options, policy=tiny):
        given = ["--calibration", str(demonstrations), "--observations", "6", "--check", "4", "--out", str(tmp_path)]
        return main(["quantize", str(policy), *given, *options]), tmp_path

    return run


def test_it_writes_a_policy_a_report_and_a_picture(quantize, capsys):
    status, out = quantize("--sensitivity", "--json")
    assert status == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "report.json").read_text())
    policy = make_policy(str(out))
    assert isinstance(policy, VLAPolicy)
    packed = {name for name, part in policy.model.named_modules() if isinstance(part, PackedLinear)}
    assert {one["name"] for one in printed["layers"]} == packed
    assert "language_model.lm_head" in {one["name"] for one in printed["left"]}
    assert printed["config"]["family"] == "msfp"
    assert printed["bytes"] == (out / "model.safetensors").stat().st_size
    assert printed["groups"]
    assert printed["checked"]["clips"] >= 4
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_it_prints_a_row_for_every_layer_and_why_others_were_left(quantize, capsys):
    status, out = quantize("--bits", "6", "--act-bits", "16", "--family", "int", "--nearest")
    said = capsys.readouterr().out
    assert status == 0
    assert json.loads((out / "report.json").read_text())["config"]["compensate"] is False
    row = next(line for line in said.splitlines() if "layers.0.mlp.down_proj" in line)
    assert "E1M4" in row
    assert "float" in row
    assert "embed_tokens (Embedding, 16384 numbers): not a linear layer" in said
    assert "error of the pose" in said


def test_layers_named_by_least_get_more_bits(quantize, capsys):
    status, _ = quantize("--act-bits", "4", "--least", '{"*.o_proj": [4, 8]}', "--json")
    assert status == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    formats = {one["name"]: one["activation"]["format"] for one in layers if ".layers.0." in one["name"]}
    bits = {name.rsplit(".", 1)[1]: FloatFormat.parse(format).bits for name, format in formats.items()}
    assert bits == {"qkv_proj": 4, "o_proj": 8, "gate_up_proj": 4, "down_proj": 4}


def test_least_takes_no_bits_from_the_action_head(quantize, tiny_diffusion, capsys):
    status, _ = quantize("--act-bits", "4", "--least", '{"*": [4, 6]}', "--json", policy=tiny_diffusion)
    assert status == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    formats = {one["activation"]["format"] for one in layers if one["name"].startswith("action_head.")}
    assert {FloatFormat.parse(format).bits for format in formats} == {8}


def test_talora_fine_tunes_a_diffusion_head_and_another_is_refused(quantize, tiny_diffusion, capsys):
    options = ("--talora", "--dfa", "--act-bits", "4", "--adapters", "3", "--updates", "12", "--json")
    status, out = quantize(*options, policy=tiny_diffusion)
    assert status == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["head"]["config"]["dfa"] is True
    assert set(printed["head"]["untuned"]) == {"error", "gripper"}
    policy = make_policy(str(out))
    assert list(policy.config.diffusion.table) == printed["head"]["table"]
    assert policy.config.diffusion.copies == 3
    assert {one["name"]: one["formats"] for one in printed["layers"]}["action_head.denoiser.time2"].keys() <= {
        *("E1M2", "E2M1", "E3M0")
    }
    assert quantize("--talora")[0] == 2
    assert "head is 'tokens'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["mini", "--dfa"], "--dfa says how --talora fine-tunes"),
        (["hold"], "policy 'hold' is no model of mllm"),
        (["nowhere"], "no policy is called"),
        (["--least", '{"*.out_proj": [4, 6]}'], "--least names '*.out_proj', which fits no linear layer"),
        (["--least", '{"*.o_proj": [4, 5]}'], "is 5: choose one of 4, 6, 8"),
        (["--check", "0"], "--check 0: both must be 1 or more"),
    ],
)
def test_wrong_usage_is_an_error(options, said, demonstrations, capsys):
    assert main(["quantize", *options, "--calibration", str(demonstrations)]) == 2
    assert said in capsys.readouterr().err
