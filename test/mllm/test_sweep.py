"""Arms of a sweep and what they do on recorded clips; the policy is a mini with random weights."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mllm.compress import CompressConfig  # noqa: E402
from mllm.demonstrations import write_demonstration  # noqa: E402
from mllm.errors import PolicyError  # noqa: E402
from mllm.policy import make_policy  # noqa: E402
from mllm.reuse import ReuseConfig  # noqa: E402
from mllm.sweep import Arm, deviation, draw_clips, grid, replay  # noqa: E402


def answered(arm, clips):
    return replay(make_policy("mini", seed=0, **arm.options), clips)


@pytest.fixture
def still(tmp_path, make_demonstration):
    """Two clips in which nothing moves, so that every rule of reuse reuses what it may."""
    for seed in range(2):
        frame = np.random.default_rng(seed).integers(0, 256, (128, 128, 3), np.uint8)
        images = {name: np.stack([frame] * 9) for name in ("agentview", "robot0_eye_in_hand")}
        write_demonstration(tmp_path / f"seed_{seed:08}.hdf5", make_demonstration(9, seed, images=images), "webp")
    return draw_clips(tmp_path, 2, 9)


def test_the_reference_comes_first_and_every_arm_once():
    arms = grid(("none", "flashvla", "random"), (64, 80), ("off", "gated"))
    assert [arm.name for arm in arms] == [
        *("none-off", "none-gated", "flashvla-64-off", "flashvla-64-gated", "flashvla-80-off", "flashvla-80-gated"),
        *("random-64-off", "random-64-gated", "random-80-off", "random-80-gated"),
    ]
    assert [arm.name for arm in grid(("fastv",), (32,), ("paper",))] == ["none-off", "fastv-32-paper"]


def test_what_is_not_the_default_stands_in_name_and_options():
    arm = grid(({"method": "flashvla", "centre": True},), (64,), ({"mode": "gated", "max_consecutive": 3},))[-1]
    assert arm.name == "flashvla-64-centre=true-gated-max_consecutive=3"
    assert arm.options == {
        "compress": {"method": "flashvla", "centre": True},
        "keep": 64,
        "reuse": {"mode": "gated", "max_consecutive": 3},
    }
    assert Arm().options == {}


def test_other_weights_are_arms_of_their_own():
    arms = grid(("none", "fastv"), (64,), ("off",), ("runs/w4", "runs/w8"))
    assert [arm.name for arm in arms] == [
        *("none-off", "fastv-64-off", "none-off@w4", "fastv-64-off@w4", "none-off@w8", "fastv-64-off@w8"),
    ]
    assert arms[3].options == {"checkpoint": "runs/w4", "compress": "fastv", "keep": 64}
    with pytest.raises(PolicyError, match="two folders of weights are called 'w4'"):
        grid(("none",), (64,), ("off",), ("a/w4", "b/w4/"))


@pytest.mark.parametrize("arm", grid(("flashvla", "tokencarve"), (64,), ("off", "gated")), ids=lambda arm: arm.name)
def test_a_policy_made_from_an_arm_s_options_is_that_arm(arm):
    made = make_policy("mini", seed=0, **arm.options)
    assert getattr(made, "reuse", ReuseConfig()) == arm.reuse
    assert made.compress == arm.compress


def test_an_unknown_method_or_rule_is_refused():
    with pytest.raises(PolicyError, match="best"):
        grid(("best",), (80,), ("off",))
    with pytest.raises(PolicyError, match="often"):
        grid(("none",), (80,), ("often",))


def test_clips_are_spread_evenly_and_drawn_by_the_seed(tmp_path, make_demonstration):
    for seed in range(6):
        write_demonstration(tmp_path / f"seed_{seed:08}.hdf5", make_demonstration(20, seed))
    drawn = [[(clip.path.name, clip.start) for clip in draw_clips(tmp_path, 3, 4, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    numbers = [int(name[5:13]) for name, _ in drawn[0]]
    assert [b - a for a, b in pairwise(numbers)] == [2, 2]
    assert all(0 <= start <= 16 for _, start in drawn[0])
    # More clips than demonstrations: each has as many as another.
    assert len({clip.path for clip in draw_clips(tmp_path, 12, 4)}) == 6


def test_a_clip_is_what_was_recorded(tmp_path, make_demonstration):
    demo = make_demonstration(20, 3)
    write_demonstration(tmp_path / "seed_00000003.hdf5", demo)
    for clip in draw_clips(tmp_path, 2, 4):
        seen = list(clip.observations())
        assert (len(seen), clip.instruction) == (4, demo.instruction)
        for offset, observation in enumerate(seen):
            assert np.array_equal(observation.images["agentview"], demo.images["agentview"][clip.start + offset])
            assert np.array_equal(observation.proprio["eef_pos"], demo.proprio["eef_pos"][clip.start + offset])


def test_no_demonstrations_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(PolicyError, match=str(tmp_path)):
        draw_clips(tmp_path, 2, 4)


def test_keeping_all_deviates_by_exactly_nothing_and_keeping_few_does_not(still):
    reference = answered(Arm(), still)
    whole = deviation(reference, answered(Arm(CompressConfig("tokencarve", keep=128)), still))
    assert {name: values.tolist() for name, values in whole.items()} == {
        "error": [0, 0],
        "gripper": [0, 0],
        "agreement": [1, 1],
    }
    few = deviation(reference, answered(Arm(CompressConfig("uniform", keep=1)), still))
    assert (few["error"] > 0).all()
    assert (few["agreement"] < 1).all()


def test_operations_with_reuse_are_the_share_that_was_computed(still):
    compress = CompressConfig("flashvla", keep=64)
    without, reusing = answered(Arm(compress), still), answered(Arm(compress, ReuseConfig("gated")), still)
    assert reusing.reused.tolist() == pytest.approx([1 / 3, 1 / 3])  # two looks, one reuse, and so on
    for name in ("flops", "visual_flops"):
        assert getattr(reusing, name) == pytest.approx(getattr(without, name) * 2 / 3)
    assert (without.flops < answered(Arm(), still).flops).all()
    # Where nothing moves, every look keeps what the look before kept.
    assert without.overlap.tolist() == [1, 1]
