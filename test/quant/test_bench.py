"""The benchmark's figures mean what they say; how large they are depends on the machine."""

from __future__ import annotations

import importlib.util
import json

import pytest

torch = pytest.importorskip("torch")

from quant import native  # noqa: E402
from quant.bench import BenchConfig, measure  # noqa: E402
from quant.contenders import OURS, groups, ours  # noqa: E402
from quant.errors import QuantError  # noqa: E402

ALL = {
    "float32",
    "float32, oneDNN",
    "bfloat16",
    "torch int8 dynamic",
    "torch int4",
    "onnxruntime int4",
    "bitsandbytes nf4",
    "bitsandbytes int8",
    *OURS,
}


@pytest.fixture(scope="module")
def result():
    before = torch.get_num_threads()
    config = BenchConfig(shapes=("64x96", "24x40"), batches=(1, 5), threads=(1, 2), repeats=2)
    result = json.loads(json.dumps(measure(config)))
    assert torch.get_num_threads() == before
    return result


def test_every_contender_has_a_row_for_every_case_or_a_reason(result):
    absent = {(one["shape"], one["name"]) for one in result["absent"]}
    assert len(absent) == len(result["absent"])
    assert all(one["reason"] for one in result["absent"])
    for shape in ("64x96", "24x40"):
        for case in ((1, 1), (1, 5), (2, 1), (2, 5)):
            rows = [row for row in result["rows"] if (row["shape"], row["threads"], row["batch"]) == (shape, *case)]
            names = [row["name"] for row in rows]
            assert len(names) == len(set(names))
            assert set(names) == ALL - {name for where, name in absent if where == shape}


def test_a_package_that_is_not_installed_and_a_layer_that_does_not_fit_are_reasons(result):
    reasons = {(one["shape"], one["name"]): one["reason"] for one in result["absent"]}
    if importlib.util.find_spec("bitsandbytes") is None:
        assert "No module named 'bitsandbytes'" in reasons["64x96", "bitsandbytes nf4"]
    assert "multiple of 32" in reasons["24x40", "torch int4"]
    assert not {name for _, name in reasons} & {"float32", *OURS}


def test_the_figures_of_a_row_agree_with_each_other(result):
    rows = {(row["shape"], row["threads"], row["batch"], row["name"]): row for row in result["rows"]}
    for (shape, threads, batch, name), row in rows.items():
        plain = rows[shape, threads, batch, "float32"]
        assert row["calls"] == 2
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["times_as_fast"] == pytest.approx(plain["min_ms"] / row["min_ms"])
        assert row["in_a_row_times"] == pytest.approx(plain["in_a_row_ms"] / row["in_a_row_ms"])
        assert row["in_a_row_ms"] > 0
        assert row["scaling"] == pytest.approx(rows[shape, 1, batch, name]["min_ms"] / row["min_ms"])
        count, size = map(int, shape.split("x"))
        assert row["share"] == pytest.approx(row["bytes"] / (2 * count * size))
        machine = next(speeds for speeds in result["machine"] if speeds["threads"] == threads)
        kind = {"memory": "read"}.get(row["bound"])
        if kind:
            moved = row["bytes"] + 4 * batch * (count + size)
            assert row["floor_ms"] == pytest.approx(1e-6 * moved / machine[kind], rel=0.1)
        assert (row["kernel"] != "") == (name in OURS)


def test_errors_shrink_with_bits_and_weights_with_them(result):
    def row(name):
        return next(r for r in result["rows"] if (r["shape"], r["batch"], r["name"]) == ("64x96", 5, name))

    assert row("float32")["error"] == 0
    assert row("float32, oneDNN")["error"] < 1e-5
    errors = [row(name)["error"] for name in ("MSFP W4A4", "MSFP W4A6", "MSFP W4A16", "MSFP W8A8", "bfloat16")]
    assert errors == sorted(errors, reverse=True)
    assert 0.05 < errors[0] < 0.3
    assert errors[-1] < 0.01
    assert row("MSFP W4A4")["bytes"] < row("bfloat16")["bytes"] == row("float32")["bytes"] / 2
    assert row("bfloat16")["share"] == 1


@pytest.mark.skipif(not native.available(), reason="the kernels are not built: there is no C compiler")
def test_our_rows_name_the_instructions_in_use():
    layer = torch.nn.Linear(32, 16, bias=False).requires_grad_(False)
    name = native.available()[0]
    with native.instructions(name):
        rows = measure(BenchConfig(shapes=("16x32",), batches=(1,), repeats=1))["rows"]
    assert {row["kernel"] for row in rows if row["name"].startswith("MSFP W4")} == {name}
    with torch.inference_mode():
        assert ours(layer, torch.randn(8, 32))[0].run(torch.zeros(3, 32)).shape == (3, 16)


def test_groups_of_weights_keep_their_largest_and_refuse_a_rest():
    weight = torch.randn(6, 64)
    codes, scales = groups(weight)
    kept = (codes.unflatten(1, (-1, 32)) - 8) * scales[..., None]
    assert bool(((kept.flatten(1) - weight).abs().unflatten(1, (-1, 32)) <= 0.501 * scales[..., None]).all())
    with pytest.raises(QuantError, match="a row has 33 weights"):
        groups(torch.randn(2, 33))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": ("64",)}, "shapes holds '64'"),
        ({"shapes": ("0x3",)}, "shapes holds 0"),
        ({"shapes": ()}, "shapes is empty"),
        ({"batches": (1, 0)}, "batches holds 0"),
        ({"threads": ()}, "threads is empty"),
        ({"repeats": 0}, "repeats holds 0"),
    ],
)
def test_a_wrong_request_is_an_error_naming_the_field(options, message):
    with pytest.raises(QuantError, match=message):
        BenchConfig(**options)
