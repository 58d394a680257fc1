"""`flashvla describe` on a small random checkpoint: what it prints where, and what it says of wrong arguments."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch")

from PIL import Image

from flashvla_ros.cli import main


@pytest.fixture
def arguments(their_llava, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (30, 50, 3), dtype=np.uint8)).save(path)
    return ["describe", str(path), "what is on the table ?", "--checkpoint", str(their_llava[2])]


def test_the_answer_is_that_of_transformers_and_its_cost_stands_beside(their_llava, arguments, capsys):
    model, processor, _ = their_llava
    assert main([*arguments, "--max-new-tokens", "8"]) == 0
    printed = capsys.readouterr()
    text = "USER: <image>\nwhat is on the table ? ASSISTANT:"
    inputs = processor(images=Image.open(arguments[1]), text=text, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert printed.out == processor.decode(tokens, skip_special_tokens=True).strip() + "\n"
    assert "16 of 16 visual tokens kept (none)" in printed.err
    for what in ("vision", "prefill", "decode", "tokens/s", "GFLOP", "keys and values 0.0"):
        assert what in printed.err


def test_a_compressed_answer_says_what_was_kept_and_saved(arguments, capsys):
    assert main([*arguments, "--compress", "tokencarve", "--keep", "6", "--max-new-tokens", "8", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["visual"], result["kept"], result["dropped"]) == (16, 6, 10)
    assert result["cache_bytes"] * result["prompt"] == result["full_cache_bytes"] * (result["prompt"] - 10)
    assert result["prefill_flops"] < result["full_prefill_flops"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--compress", "best"], "method is 'best'"),
        (["--compress", "flashvla", "--keep", "17", "--max-new-tokens", "8"], "keep is 17: there are 16 visual tokens"),
        (["--max-new-tokens", "0"], "an answer of 0 tokens"),
        (["--max-new-tokens", "90"], "the model has 96 positions"),
        (["--checkpoint", "/nowhere"], "there is no folder /nowhere"),
    ],
)
def test_wrong_arguments_are_wrong_usage(arguments, more, message, capsys):
    assert main([*arguments, *more]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_image_fails(arguments, tmp_path, capsys):
    path = tmp_path / "no.png"
    path.write_text("no image")
    assert main(["describe", str(path), *arguments[2:]]) == 1
    assert "no.png" in capsys.readouterr().err
