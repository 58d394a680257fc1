"""What a run starts from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mllm.actions import ActionStatistics  # noqa: E402
from mllm.training.config import TrainConfig  # noqa: E402
from mllm.training.data import find_demonstrations, load_demonstrations  # noqa: E402
from mllm.training.start import make_model, proprio_range, widen  # noqa: E402

NAMES = ("eef_pos", "gripper_qpos")


@pytest.fixture
def demos(demonstrations):
    return load_demonstrations(find_demonstrations([str(demonstrations)]))[0]


@pytest.fixture
def model(tiny, demos):
    """A model with proprioception, of the demonstrations' range."""
    settings = TrainConfig(name="run", data=("unused",), init=str(tiny), change={"proprio": NAMES})
    return make_model(settings, demos, lambda line: None)[0]


def narrowed(model, low, high, mask=()):
    statistics = ActionStatistics(low, high, mask)
    model.config = replace(model.config, proprio_statistics=statistics)
    return statistics


def embedded(model, rows):
    return model.proprio_projector(torch.from_numpy(model.config.proprio_statistics.normalise(rows)).float())


@torch.no_grad()
def test_a_range_grows_to_hold_the_demonstrations_and_answers_inside_the_old_one_stay(model, demos):
    low, high = proprio_range(NAMES, demos)
    old = narrowed(model, low + 0.3 * (high - low), high - 0.2 * (high - low))
    inside = np.random.default_rng(0).uniform(old.low, old.high, (64, len(low)))
    outside = low + 0.1 * (high - low)
    before, clipped = embedded(model, inside), embedded(model, outside)
    widen(model, demos)
    now = model.config.proprio_statistics
    assert np.allclose([now.low, now.high], [low, high])
    assert torch.allclose(embedded(model, inside), before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(embedded(model, outside), clipped, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_a_range_that_holds_the_demonstrations_already_is_left_alone(model, demos):
    low, high = proprio_range(NAMES, demos)
    old = narrowed(model, low - 1, high + 2)
    weight = model.proprio_projector.fc1.weight.clone()
    widen(model, demos)
    assert model.config.proprio_statistics == old
    assert torch.equal(model.proprio_projector.fc1.weight, weight)


@torch.no_grad()
def test_numbers_that_never_moved_and_numbers_that_are_not_scaled(model, demos):
    low, high = proprio_range(NAMES, demos)
    mask = (True, True, False, True, True)
    least, most = low + 0.1 * (high - low), high.copy()
    most[0] = least[0]
    narrowed(model, least, most, mask)
    rows = np.random.default_rng(0).uniform(least, most, (64, 5))
    before = embedded(model, rows)
    widen(model, demos)
    assert torch.allclose(embedded(model, rows), before, rtol=1e-4, atol=1e-5)
    assert model.config.proprio_statistics.mask == mask
    assert model.config.proprio_statistics.low[2] == pytest.approx(least[2])
