"""The kernels touch no memory but their own and do nothing undefined, whatever the shape and the numbers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

QUANT = Path(__file__).resolve().parents[2] / "quant" / "csrc"
DRIVER = Path(__file__).with_name("kernels_driver.c")
FLAGS = ["-std=c11", "-O1", "-g1", "-ffp-contract=off", "-fopenmp", f"-I{QUANT}"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def build(out: Path, *sources: Path) -> subprocess.CompletedProcess:
    command = [os.environ.get("CC", "cc"), *FLAGS, *SANITIZERS, *map(str, sources), "-o", str(out), "-lm"]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_set_of_instructions_is_clean_over_odd_shapes_and_rare_numbers(tmp_path):
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("there is no C compiler")
    empty = tmp_path / "empty.c"
    empty.write_text("int main(void) { return 0; }\n")
    if (built := build(tmp_path / "empty", empty)).returncode or subprocess.run([tmp_path / "empty"]).returncode:
        pytest.skip(f"the compiler has no address and undefined-behaviour sanitizers: {built.stderr[:200]}")
    built = build(tmp_path / "driver", *sorted(QUANT.glob("*.c")), DRIVER)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([tmp_path / "driver"], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("sets of instructions\n")
