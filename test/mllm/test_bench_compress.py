"""The benchmark's figures mean what they say; how large they are depends on the machine."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from mllm.bench_compress import BenchCompressConfig, measure_compression, score_speed  # noqa: E402
from mllm.demonstrations import write_demonstration  # noqa: E402
from mllm.errors import PolicyError  # noqa: E402


def test_every_arm_is_measured_on_the_same_observations_beside_the_uncompressed_one():
    config = BenchCompressConfig(methods=("flashvla", "uniform"), keep=64, steps=2)
    result = json.loads(json.dumps(measure_compression(config)))
    arms = result["arms"]
    assert list(arms) == ["uncompressed", "flashvla all", "flashvla 64", "uniform all", "uniform 64"]
    for name, arm in arms.items():
        stages = [
            times["min_ms"] for stage, times in arm.items() if isinstance(times, dict) and stage not in ("step", "cpu")
        ]
        assert 0 < sum(stages) <= arm["step"]["p99_ms"]
        assert ("select" in arm) == (name != "uncompressed")
        assert arm["visual_flops"] == (1 if name.endswith(("all", "uncompressed")) else 0.65)
    assert arms["flashvla all"]["step_flops"] > 1 > arms["flashvla 64"]["step_flops"] > arms["uniform 64"]["step_flops"]
    assert arms["uncompressed"]["step_share"] == 1
    assert result["exact"] == {
        "observations": 2,
        "keeps": [16, 32, 48, 64, 80, 96, 112],
        "equal": 2,
        "tokens": 0,
    }


def test_frames_of_demonstrations_are_looked_at_where_they_are_given(make_demonstration, tmp_path):
    for seed in range(2):
        write_demonstration(tmp_path / f"seed_{seed:08}.hdf5", make_demonstration(4, seed, size=128))
    config = BenchCompressConfig("mini-ar", methods=("uniform",), steps=1, demonstrations=str(tmp_path))
    assert measure_compression(config)["exact"]["observations"] == 1
    with pytest.raises(PolicyError, match="there are no demonstrations under"):
        measure_compression(replace(config, demonstrations=str(tmp_path / "none")))


def test_the_score_is_compared_with_the_published_call_on_the_same_tokens():
    result = score_speed((32, 64), repeats=1)
    assert result["times_as_fast"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "huge"}, "model is 'huge'"),
        ({"methods": ("best",)}, r"methods is \('best',\): name one or more of flashvla"),
        ({"methods": ()}, "methods is"),
        ({"steps": 0}, "steps is 0"),
        ({"keep": 0}, "keep is 0"),
    ],
)
def test_a_wrong_request_is_an_error_naming_the_field(options, message):
    with pytest.raises(PolicyError, match=message):
        BenchCompressConfig(**options)
