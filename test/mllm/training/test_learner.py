"""Augmentation and labels."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mllm.training.learner import shift, soft_labels, weighted  # noqa: E402


def test_a_label_spreads_over_its_neighbours_and_adds_up_to_one():
    labels = soft_labels(16, 1.5)
    torch.testing.assert_close(labels.sum(1), torch.ones(16))
    assert labels.argmax(1).tolist() == list(range(16))
    assert labels[8, 7] == labels[8, 9] > labels[8, 10]
    assert torch.equal(soft_labels(4, 0), torch.eye(4))


def test_a_shifted_image_is_the_image_moved_with_its_edge_repeated():
    images = np.arange(2 * 2 * 6 * 6 * 3, dtype=np.uint8).reshape(2, 2, 6, 6, 3)
    moved = shift(images, 2, np.random.default_rng(3))
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    by = np.random.default_rng(3).integers(-2, 2, (2, 2, 2), endpoint=True)
    for sample in range(2):
        for camera in range(2):
            row, column = by[sample, camera] + 2
            expected = padded[sample, camera, row : row + 6, column : column + 6]
            np.testing.assert_array_equal(moved[sample, camera], expected)
    assert len(np.unique(by)) > 2


def test_unknown_actions_do_not_count():
    loss = torch.tensor([[[1.0] * 7, [9.0] * 7]])
    assert weighted(loss, torch.tensor([[1.0, 0.0]]), torch.ones(7)).item() == 1
    assert weighted(loss, torch.tensor([[0.0, 0.0]]), torch.ones(7)).item() == 0
