"""`flashvla experiment` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

from flashvla_ros.cli import main

QUICK = ["--seeds", "1", "--updates", "2", "--fit-steps", "3", "--samples", "80", "--json"]


def test_msfp_writes_rows_a_table_and_a_picture_and_adds_nothing_when_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "msfp"
    assert main(["experiment", "msfp", str(out), *QUICK]) == 0
    first = capsys.readouterr()
    told = json.loads(first.out)
    arms = told["outcomes"]["digits"]["frechet to full"]
    assert [arm["n"] for arm in arms] == [1] * 11
    assert "MSFP + TALoRA + DFA" in first.err
    assert json.loads((out / "summary.json").read_text()) == told
    assert (out / "digits.png").read_bytes().startswith(b"\x89PNG")
    rows = (out / "rows.jsonl").read_bytes()
    assert main(["experiment", "msfp", str(out), *QUICK]) == 0
    assert json.loads(capsys.readouterr().out) == told
    assert (out / "rows.jsonl").read_bytes() == rows
    assert main(["experiment", "msfp", str(out), *QUICK, "--rank", "3"]) == 2
    assert "rank" in capsys.readouterr().err


def test_with_demonstrations_an_action_head_is_put_to_the_test(
    tmp_path: Path, tiny_diffusion: Path, demonstrations: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--demonstrations", str(demonstrations), "--checkpoint", str(tiny_diffusion), "--frames", "24"]
    assert main(["experiment", "msfp", str(tmp_path), *QUICK, *given]) == 0
    outcomes = json.loads(capsys.readouterr().out)["outcomes"]
    assert list(outcomes) == ["action head"]
    assert {metric: len(arms) for metric, arms in outcomes["action head"].items()} == {
        "apart": 11,
        "pose apart": 11,
        "from the label": 11,
    }
    assert (tmp_path / "features.safetensors").is_file()
    assert (tmp_path / "action-head.png").read_bytes().startswith(b"\x89PNG")
