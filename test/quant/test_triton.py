"""The GPU's kernels without a GPU: interpreted, compiled to its instructions, and which of them a layer takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from quant import ops, triton_layer  # noqa: E402
from quant.errors import QuantError  # noqa: E402
from quant.formats import FloatFormat, integers  # noqa: E402
from quant.packed import Activation, PackedLinear  # noqa: E402
from quant.triton_layer import EXACT, LEAST, operands, tile_size  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
FOUR = tuple(map(FloatFormat.parse, ("E1M2", "E2M1", "E3M0")))
ALL = [
    FloatFormat(exponent, mantissa, signed)
    for exponent in range(1, 6)
    for mantissa in range(8)
    for signed in (False, True)
    if 2 <= exponent + mantissa + signed <= 8
]


def test_interpreted_kernels_give_the_references_bits():
    pytest.importorskip("triton", reason="Triton is not installed: `pip install triton` brings it")
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    result = subprocess.run(
        [*command, str(Path(__file__).with_name("interpreted_kernels.py"))],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@given(st.sampled_from(ALL), st.sampled_from(FOUR), st.booleans())
def test_tensor_cores_get_only_numbers_and_sums_that_they_hold_exactly(inputs, weights, eights):
    found = operands(inputs.mantissa, inputs.largest, weights.largest, eights)
    if found is None:
        # Not even the shortest sum in float32, or an input beyond float16.
        wide = LEAST[torch.float16] * inputs.largest * weights.largest > 1 << 24
        assert wide or inputs.largest > torch.finfo(torch.float16).max
        return
    dtype, run = found
    whole = integers(inputs).double()
    assert torch.equal(whole.to(dtype).double(), whole)
    assert run * inputs.largest * weights.largest <= EXACT[dtype]
    assert run & (run - 1) == 0
    assert run >= LEAST[dtype]
    assert eights or dtype is torch.float16


def test_which_pairs_of_4_bits_run_in_8():
    inputs = [*FOUR, *(FloatFormat.parse(name) for name in ("uE1M3", "uE2M2", "uE3M1", "uE4M0"))]
    runs = {
        (weights.name, each.name): found[1]
        for weights in FOUR
        for each in inputs
        if (found := operands(each.mantissa, each.largest, weights.largest, True)) and found[0].itemsize == 1
    }
    assert runs == {
        ("E1M2", "E1M2"): 64,
        ("E1M2", "E2M1"): 64,
        ("E1M2", "uE1M3"): 64,
        ("E1M2", "uE2M2"): 32,
        ("E2M1", "E1M2"): 64,
        ("E2M1", "E2M1"): 32,
        ("E2M1", "uE1M3"): 32,
    }


def test_the_operator_computes_on_gpus_and_takes_codes_of_4_bits_alone():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("flashvla::packed_linear", "CUDA")
    codes = torch.zeros((20, 50), dtype=torch.uint8)
    packed = PackedLinear(codes, FOUR[:1], torch.zeros(20), torch.ones(20), None, Activation(FOUR[1], 0.3))
    held = (packed.choice, packed.scale, packed.bias, packed.sums)
    with pytest.raises(QuantError, match="codes of 4 bits"):
        ops._compute_on_gpu(torch.zeros(3, 50), packed.tiles, None, *held, 20, 7, *packed.activation.grid)
    with pytest.raises(QuantError, match="not of 20 channels and 80 inputs"):
        ops._compute_on_gpu(torch.zeros(3, 80), packed.tiles, packed.table, *held, 20, 7, *packed.activation.grid)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_no_kernels_are_promised():
    assert not triton_layer.available(torch.device("cuda"))
    assert not triton_layer.available(torch.device("cpu"))


WEIGHTS = {"tiles": "*u8", "table": "*i8", "choice": "*u8", "scale": "*fp32", "bias": "*fp32", "sums": "*i16"}
GRID = {"step": "fp32", "zero": "fp32", "mantissa": "i32", "low": "fp32", "high": "fp32"}
SIZES = dict.fromkeys(("rows", "columns", "channels", "groups", "width"), "i32")
NAMES = {
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}


def compiled(tmp_path, monkeypatch, name, capability, constants, **pointers):
    """What a kernel becomes on a GPU of a compute capability, with numbers of columns that are multiples of 16."""
    triton = pytest.importorskip("triton", reason="Triton is not installed: `pip install triton` brings it")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from quant import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_kernels, name)
    constants, warps = dict(constants), constants.get("num_warps", 4)
    constants.pop("num_warps", None)
    types = {**WEIGHTS, **GRID, **SIZES, "steps": "*fp32", **pointers}
    signature = {each: "constexpr" if each in constants else types[each] for each in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, each in enumerate(kernel.arg_names)
        if signature[each].startswith("*") or each in ("columns", "width")
    }
    values = {(kernel.arg_names.index(each),): value for each, value in constants.items()}
    return triton.compile(
        ASTSource(kernel, signature, values, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": False},
    )


@pytest.mark.parametrize(
    ("dtype", "rows", "capability", "instruction"),
    [
        (torch.float8_e4m3fn, 128, 90, "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"),
        (torch.float8_e4m3fn, 16, 89, "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"),
        (torch.float16, 128, 80, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"),
        (torch.bfloat16, 16, 90, "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16"),
        (torch.float32, 128, 80, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"),
    ],
)
def test_tensor_cores_multiply_many_rows(tmp_path, monkeypatch, dtype, rows, capability, instruction):
    size = tile_size(rows, dtype, 64)
    constants = {**size, "WHOLE": False}
    if dtype in (torch.bfloat16, torch.float32):
        constants["steps"] = None
    found = compiled(tmp_path, monkeypatch, "multiply_tile", capability, constants, x=NAMES[dtype], y="*bf16")
    ptx = found.asm["ptx"]
    assert instruction in ptx
    assert "fma" not in ptx
    # 99 kB is what every GPU from 8.0 to 9.0 has.
    assert found.metadata.shared <= 99 << 10 or capability == 90
    if dtype is torch.float8_e4m3fn:
        # Either half of the codes starts a sum of its own, which is then added in float32.
        sums = size["ROWS"] * size["CHANNELS"] // (32 * size["num_warps"])
        assert ptx.count("add.rn.f32") >= 2 * sums
        starts = re.findall(r"wgmma\.mma_async.*?(\S+), 1, 1;", ptx)
        if capability == 90:
            assert starts.count("0") == 2
            assert len(starts) == 2 * size["RUN"] // 32


@pytest.mark.parametrize("quantised", [True, False])
def test_few_rows_are_multiplied_without_tensor_cores_by_codes_read_16_at_a_time(tmp_path, monkeypatch, quantised):
    constants = {"QUANTISED": quantised, "GROUPS": 8}
    ptx = compiled(tmp_path, monkeypatch, "multiply_row", 80, constants, x="*fp16", y="*fp16").asm["ptx"]
    assert "ld.global.v4.b32" in ptx
    assert "mma" not in ptx
    assert ("mad.lo.s32" in ptx) == quantised


@pytest.mark.parametrize(("dtype", "capability"), [(torch.float8_e4m3fn, 90), (torch.float16, 80)])
def test_inputs_are_divided_and_rounded_as_the_reference_does(tmp_path, monkeypatch, dtype, capability):
    ptx = compiled(tmp_path, monkeypatch, "quantise_rows", capability, {}, x="*bf16", whole=NAMES[dtype]).asm["ptx"]
    assert "div.rn.f32" in ptx
    assert not re.search(r"fma|div\.full|\.ftz", ptx)
    assert ("e4m3x2" in ptx) == (dtype is torch.float8_e4m3fn)
