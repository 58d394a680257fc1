"""The benchmark's figures mean what they say; how large they are depends on the machine."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from mllm.bench import BenchConfig, measure  # noqa: E402
from mllm.errors import PolicyError  # noqa: E402


def test_both_sides_choose_the_same_tokens_and_the_stages_make_up_the_step():
    result = json.loads(json.dumps(measure(BenchConfig(steps=3))))
    assert result["equal_tokens"] is True
    assert list(result["ours"]) == ["preprocess", "vision", "prefill", "decode", "step"]
    assert list(result["baseline"]) == ["preprocess", "vision", "generate", "step"]
    for side in ("ours", "baseline"):
        stages = [times["min_ms"] for stage, times in result[side].items() if stage != "step"]
        assert sum(stages) <= result[side]["step"]["p99_ms"]
        assert min(stages) > 0
    assert result["floor_ms"]["step"] == pytest.approx(
        sum(result["floor_ms"][s] for s in ("vision", "prefill", "decode")), abs=0.01
    )
    assert result["machine"]["gb_per_s"] > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"model": "huge"}, "model is 'huge'"), ({"steps": 0}, "steps is 0"), ({"device": "tpu"}, "device is 'tpu'")],
)
def test_a_wrong_request_is_an_error_naming_the_field(options, message):
    with pytest.raises(PolicyError, match=message):
        BenchConfig(**options)
