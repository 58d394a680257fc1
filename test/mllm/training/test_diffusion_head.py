"""The head that draws actions from noise: trained, kept and used by what every other head is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

from mllm.checkpoint import load_checkpoint  # noqa: E402
from mllm.config import DiffusionConfig, named_config  # noqa: E402
from mllm.diffusion.head import DRAWS, DiffusionHead  # noqa: E402
from mllm.errors import PolicyError  # noqa: E402
from mllm.policy import Observation, make_policy  # noqa: E402
from mllm.training.config import TrainConfig  # noqa: E402
from mllm.training.trainer import Trainer  # noqa: E402

SMALL = {"times": 50, "steps": 5, "width": 32, "depth": 1}


@pytest.fixture
def drawn(settings):
    change = settings["change"] | {"head": "diffusion", "diffusion": SMALL}
    return settings | {"change": change, "batch": 16, "validation": 0.0, "shift": 0}


def trained(settings, runs, until=None, **change):
    trainer = Trainer(TrainConfig(**{**settings, **change}), runs, lambda line: None)
    trainer.run(until)
    return trainer


def test_a_run_in_two_parts_equals_one_in_one(drawn, tmp_path):
    trained(drawn, tmp_path / "whole", steps=6)
    trained(drawn, tmp_path / "parts", steps=6, until=3)
    trained(drawn, tmp_path / "parts", steps=6)
    whole, parts = (load_file(tmp_path / name / "run" / "state.safetensors") for name in ("whole", "parts"))
    assert any("action_head.denoiser" in name for name in whole)
    assert whole.keys() == parts.keys()
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name


def test_it_draws_the_actions_that_the_hidden_states_tell():
    head, generator = DiffusionHead(3, 2, 3, DiffusionConfig(**SMALL)), np.random.default_rng(0)
    hidden = torch.randn(256, 2, 3)
    actions = hidden.tanh()
    optimiser = torch.optim.Adam(head.parameters(), 5e-3)
    for _ in range(250):
        rows = torch.from_numpy(generator.integers(0, 256, 64))
        optimiser.zero_grad()
        head.loss(hidden[rows], actions[rows], generator).mean().backward()
        optimiser.step()
    with torch.no_grad():
        drawn = head(hidden)
    assert drawn.shape == (256, 2, 3)
    assert (drawn - actions).abs().mean() < 0.6 * (drawn - actions.roll(1, 0)).abs().mean()


def test_what_it_ships_draws_the_same_actions_for_the_same_observation(drawn, tmp_path):
    folder = trained(drawn, tmp_path, steps=1).folder / "checkpoint"
    model, _ = load_checkpoint(folder)
    assert model.config.diffusion == DiffusionConfig(**SMALL)
    policy = make_policy("mini", checkpoint=str(folder))
    generator = np.random.default_rng(0)
    images = {name: generator.integers(0, 256, (32, 32, 3)).astype(np.uint8) for name in policy.config.cameras}
    observation = Observation(images, {"eef_pos": np.zeros(3), "gripper_qpos": np.zeros(2)})
    policy.reset("pick up the bowl")
    first = [policy.act(observation).action for _ in range(2)]
    policy.reset("pick up the bowl")
    assert np.array_equal(first, [policy.act(observation).action for _ in range(2)])
    dark = replace(observation, images={name: image // 4 for name, image in images.items()})
    episodes = [policy.begin("pick up the bowl") for _ in range(2)]
    together = policy.act_batch(episodes, [dark, observation])
    np.testing.assert_allclose(together[1].action, first[0], atol=1e-5)
    assert not np.allclose(together[0].action, first[0], atol=1e-3)


def test_its_loss_is_the_error_of_the_noise_at_the_levels_drawn():
    head = DiffusionHead(6, 2, 3, DiffusionConfig(**SMALL))
    hidden, actions = torch.randn(4, 2, 6), torch.rand(4, 2, 3) * 2 - 1
    loss = head.loss(hidden, actions, np.random.default_rng(3))
    generator = np.random.default_rng(3)
    times = generator.integers(50, size=4 * DRAWS)
    noise = torch.from_numpy(generator.standard_normal((4 * DRAWS, 2, 3), np.float32))
    expected = torch.zeros(4, 2, 3)
    for place, time in enumerate(times.tolist()):
        row, left = place % 4, float(head.schedule.alpha_bar[time])
        noised = left**0.5 * actions[row] + (1 - left) ** 0.5 * noise[place]
        found = head.denoiser(noised.reshape(1, 6), torch.tensor([time]), hidden[row].reshape(1, 12))
        expected[row] += (found.reshape(2, 3) - noise[place]).square() / DRAWS
    torch.testing.assert_close(loss, expected)


def test_wrong_settings_are_refused():
    for change, said in (({"steps": 101}, "steps"), ({"times": 5}, "times"), ({"width": 0}, "width")):
        with pytest.raises(PolicyError, match=said):
            DiffusionConfig(**change)
    with pytest.raises(PolicyError, match="'slots'"):
        replace(named_config("mini"), head="diffusion")
