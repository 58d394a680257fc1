"""What the gate sees: something that moves by itself, not the motion that goes on, and only where tokens were kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm.errors import PolicyError
from mllm.frame_gate import CELLS, FrameGate, calibrate, touching
from mllm.policy import TokenLayout
from mllm.reuse import ReuseConfig

SIDE, BLOCK = 128, 20
THRESHOLD = ReuseConfig().max_surprise
BACKGROUND = np.random.default_rng(0).integers(60, 110, (SIDE, SIDE, 3)).astype(np.uint8)
LAYOUT = TokenLayout(("front",), 8, 8)


def scene(*blocks: tuple[int, int]) -> dict[str, np.ndarray]:
    """The table with a light block at each (row, column)."""
    image = BACKGROUND.copy()
    for row, column in blocks:
        image[row : row + BLOCK, column : column + BLOCK] = 220
    return {"front": image}


def shown(gate: FrameGate, *frames: dict[str, np.ndarray]) -> float:
    """The surprise of the last of several frames."""
    return [gate.surprise(frame) for frame in frames][-1]


@settings(deadline=None, max_examples=60)
@given(row=st.integers(0, 100), column=st.integers(0, 90), shift=st.integers(5, 18))
def test_a_block_that_is_moved_is_seen_in_the_frame_that_shows_it(row, column, shift):
    still = scene((row, column))
    gate = FrameGate()
    assert shown(gate, still, still, still) < THRESHOLD
    assert gate.surprise(scene((row, column + shift))) > THRESHOLD


@given(noise=st.integers(0, 8))
@settings(deadline=None, max_examples=10)
def test_a_camera_s_noise_is_no_surprise(noise):
    generator = np.random.default_rng(noise)

    def noisy() -> dict[str, np.ndarray]:
        image = scene((50, 50))["front"].astype(int) + generator.integers(-noise, noise + 1, (SIDE, SIDE, 3))
        return {"front": image.clip(0, 255).astype(np.uint8)}

    gate = FrameGate()
    assert max(gate.surprise(noisy()) for _ in range(10)) < THRESHOLD


def test_motion_that_goes_on_is_no_surprise_and_what_moves_beside_it_is():
    gate = FrameGate()
    arm = [(20, 4 * step) for step in range(12)]
    surprises = [gate.surprise(scene(place, (90, 90))) for place in arm]
    assert max(surprises[2:]) < THRESHOLD
    assert gate.surprise(scene((20, 48), (90, 80))) > THRESHOLD


def test_only_kept_tokens_count():
    # The block at row 90 lies in the tokens of rows 5 and 6, columns 5 to 7 of 8 x 8.
    touched = np.array([row * 8 + column for row in (5, 6) for column in (5, 6, 7)])
    others = np.setdiff1d(np.arange(64), touched)
    still, moved = scene((90, 90)), scene((90, 98))
    for kept, seen in ((touched, True), (others, False), (None, True), (np.array([], int), False)):
        gate = FrameGate(LAYOUT)
        gate.watch(kept)
        assert (shown(gate, still, still, still, moved) > THRESHOLD) is seen, kept


def test_the_layout_s_mirror_and_crop_say_where_a_token_lies():
    still, moved = scene((90, 90)), scene((90, 98))
    touched = np.array([row * 8 + 7 - column for row in (5, 6) for column in (5, 6, 7)])
    mirrored = FrameGate(TokenLayout(("front",), 8, 8, mirror=True))
    mirrored.watch(touched)
    assert shown(mirrored, still, still, moved) > THRESHOLD
    mirrored.clear()
    mirrored.watch(np.setdiff1d(np.arange(64), touched))
    assert shown(mirrored, still, still, moved) < THRESHOLD
    # The quarter in the middle ends before column 96: what moves behind it is not seen.
    cropped = FrameGate(TokenLayout(("front",), 8, 8, area=0.25))
    assert shown(cropped, scene((50, 100)), scene((50, 100)), scene((50, 105))) < THRESHOLD
    cropped.clear()
    assert shown(cropped, scene((50, 60)), scene((50, 60)), scene((50, 65))) > THRESHOLD


def test_every_camera_of_the_layout_is_looked_at_and_no_other():
    gate = FrameGate(TokenLayout(("front", "wrist"), 8, 8))
    still, moved = scene((90, 90))["front"], scene((90, 98))["front"]
    gate.watch(np.arange(64, 128))  # the wrist's
    frames = [{"front": still, "wrist": still, "other": still}] * 3
    assert shown(gate, *frames, {"front": moved, "wrist": still, "other": moved}) < THRESHOLD
    assert gate.surprise({"front": moved, "wrist": moved}) > THRESHOLD
    assert gate.surprise({"front": moved}) == float("inf")


def test_without_an_image_or_after_a_change_of_size_everything_is_possible():
    assert FrameGate().surprise({}) == float("inf")
    gate = FrameGate()
    gate.surprise(scene())
    assert gate.surprise({**scene(), "second": BACKGROUND}) == float("inf")
    assert gate.surprise({**scene(), "second": BACKGROUND}) == 0  # the first comparison of these two


@pytest.mark.parametrize("shape", [(128, 128, 3), (480, 640, 3), (64, 64, 3), (40, 30, 3)])
def test_images_of_any_size_are_taken(shape):
    gate = FrameGate()
    dark, light = np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8)
    assert shown(gate, *[{"front": dark}] * 3) == 0
    assert gate.surprise({"front": light}) == 255


@given(st.integers(1, 40))
def test_every_token_touches_a_cell_and_every_cell_a_token(count):
    pairs = touching(count)
    assert pairs.shape == (CELLS, count)
    assert pairs.any(0).all()
    assert pairs.any(1).all()
    if CELLS % count == 0:
        assert np.array_equal(pairs, np.eye(count, dtype=int).repeat(CELLS // count, 0))


def test_tokens_that_the_layout_does_not_have_are_an_error():
    with pytest.raises(PolicyError, match="kept tokens 3 to 64 do not fit the layout's 64"):
        FrameGate(LAYOUT).watch(np.array([3, 64]))


def test_the_threshold_comes_from_recorded_demonstrations(tmp_path, make_demonstration):
    from mllm.demonstrations import write_demonstration

    generator = np.random.default_rng(1)
    paths = []
    for seed in range(2):
        frames = generator.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8)
        paths.append(tmp_path / f"seed_{seed}.hdf5")
        images = {"agentview": frames, "robot0_eye_in_hand": frames[::-1].copy()}
        write_demonstration(paths[-1], make_demonstration(steps=8, seed=seed, images=images))
    found = calibrate(paths, 0.5)
    assert (found.frames, found.episodes, found.quantile) == (12, 2, 0.5)
    assert calibrate(paths, 0.1).threshold <= found.threshold <= calibrate(paths, 0.99).threshold
    with pytest.raises(PolicyError, match="quantile is 1"):
        calibrate(paths, 1)
    with pytest.raises(PolicyError, match="0 episodes have no third frame"):
        calibrate([])
