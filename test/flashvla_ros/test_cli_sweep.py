"""`flashvla sweep` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashvla_ros.cli import main

SETTING = ["--policy", "hold", "--methods", "none", "--suite", "libero_object", "--tasks", "0", "--states", "0-1"]
SETTING += ["--cameras", "--step-limit", "8", "--settle-steps", "1", "--workers", "1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["open", "/nowhere"], "no demonstrations under /nowhere"),
        (["open", "/nowhere", "--methods", "best"], "best"),
        (["open", "/nowhere", "--clips", "1"], "1 clips"),
        (["closed", "--reuses", "{"], "--reuses"),
        (["closed", "--options", "[]"], "--options"),
        (["closed", "--tasks", "99"], "no task 99"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_says_what_before_any_work(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_any_policy_can_be_swept_over_rules_of_reuse_in_the_simulator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.sqlite"
    command = ["sweep", "closed", str(path), *SETTING, "--reuses", "off", "paper", "--json"]
    assert main(command) == 0
    first, paper = json.loads(capsys.readouterr().out)["arms"]
    assert (first["variant"], first["n"], first["reused"], first["against"]) == ("none-off", 2, 0, None)
    assert (paper["variant"], paper["reused"], paper["against"]["n"]) == ("none-paper", 0.25, 2)
    assert main(["report", str(path)]) == 0
    assert "Paired differences" in path.with_suffix(".html").read_text()
