"""Which frames are drawn, and what is their label."""

from __future__ import annotations

import numpy as np
import pytest

from mllm.demonstrations import read_demonstration
from mllm.errors import PolicyError
from mllm.tokenizer import WordTokenizer
from mllm.training.data import Frames, find_demonstrations, held_out, load_demonstrations

PROPRIO = ("eef_pos", "gripper_qpos")


@pytest.fixture
def demos(demonstrations):
    return [read_demonstration(path) for path in find_demonstrations([str(demonstrations)])]


@pytest.fixture
def frames(demos):
    return Frames(demos, ("agentview",), PROPRIO, [])


def test_a_label_is_the_expert_s_next_actions_and_ends_with_the_episode(frames, demos):
    batch = frames.batch(np.array([0, 10, 11, 12]), 4, WordTokenizer())
    np.testing.assert_array_equal(batch.actions[0], demos[0].actions[:4].astype(np.float32))
    np.testing.assert_array_equal(batch.actions[3], demos[1].actions[:4].astype(np.float32))
    assert batch.known.tolist()[1:3] == [[True, True, False, False], [True, False, False, False]]


def test_what_the_expert_had_no_answer_to_is_neither_drawn_nor_a_label(frames):
    batch = frames.batch(np.array([2]), 3, WordTokenizer())
    assert batch.known.tolist() == [[True, False, True]]
    assert frames.weights({}, {})[3] == 0


def test_a_batch_carries_the_frame_s_own_image_words_and_proprioception(frames, demos):
    batch = frames.batch(np.array([13]), 2, WordTokenizer())
    assert batch.images.shape == (1, 1, 32, 32, 3)
    assert batch.texts == [WordTokenizer().prompt("pick up the bowl")]
    expected = np.concatenate([demos[1].proprio[name][1] for name in PROPRIO])
    np.testing.assert_array_equal(batch.proprio[0], expected)


def test_frames_are_drawn_by_the_weights_of_phase_and_source(frames):
    plain = frames.weights({}, {})
    heavy = frames.weights({"close": 3.0}, {})
    assert heavy[6] / heavy[0] == pytest.approx(3 * plain[6] / plain[0])
    assert heavy.sum() == pytest.approx(1)
    with pytest.raises(PolicyError, match="no frame has a weight above 0"):
        frames.weights({}, {"expert": 0.0})
    with pytest.raises(PolicyError, match="phase_weights names 'swim'"):
        frames.weights({"swim": 2.0}, {})


def test_a_phase_keeps_its_number_when_other_demonstrations_come(demos):
    phases = ["retreat"]
    frames = Frames(demos, ("agentview",), (), phases)
    assert phases == ["retreat", "approach", "close", "lost"]
    assert frames.batch(np.array([0]), 1, WordTokenizer()).phases.tolist() == [1]


def test_an_episode_is_held_out_for_ever_or_never(demos):
    assert [held_out(demo, 0.5) for demo in demos] == [held_out(demo, 0.5) for demo in reversed(demos)][::-1]
    assert not any(held_out(demo, 0.0) for demo in demos)


def test_a_damaged_demonstration_is_named(demonstrations, tmp_path):
    broken = tmp_path / "seed_00000000.hdf5"
    broken.write_bytes((demonstrations / broken.name).read_bytes()[:-500])
    with pytest.raises(PolicyError, match=broken.name):
        load_demonstrations([broken])


def test_a_folder_without_demonstrations_says_how_to_get_some(tmp_path):
    with pytest.raises(PolicyError, match="flashvla collect"):
        find_demonstrations([str(tmp_path)])
