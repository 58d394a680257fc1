"""The experiment's features are what the policy's slots say, and its head is measured on episodes it has not seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mllm.actions import ActionStatistics  # noqa: E402
from mllm.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from mllm.demonstrations import decode_image, read_demonstration  # noqa: E402
from mllm.diffusion.arms import ARMS, QuantiseConfig  # noqa: E402
from mllm.diffusion.experiment import ExperimentConfig, run_experiment  # noqa: E402
from mllm.diffusion.fit import FitConfig  # noqa: E402
from mllm.diffusion.head_task import HeadTask, kept_features, record_features  # noqa: E402
from mllm.diffusion.schedule import Schedule  # noqa: E402
from mllm.errors import PolicyError  # noqa: E402
from mllm.policy import Observation, make_policy  # noqa: E402
from mllm.training.data import find_demonstrations  # noqa: E402
from mllm.vla import VLA, init_random  # noqa: E402
from quant.dfa import DistilConfig  # noqa: E402

CHUNK = 4


@pytest.fixture
def checkpoint(tiny, tmp_path):
    loaded, tokenizer = load_checkpoint(tiny)
    statistics = ActionStatistics((-1.0,) * 3, (1.0,) * 3)
    change = {"decoding": "slots", "chunk": CHUNK, "head": "regression", "proprio": ("eef_pos",)}
    config = replace(loaded.config, proprio_statistics=statistics, **change)
    save_checkpoint(tmp_path / "chunked", init_random(VLA(config), 0), tokenizer)
    return tmp_path / "chunked"


def test_features_are_the_states_from_which_the_policy_answers(checkpoint, demonstrations):
    found = record_features(checkpoint, [str(demonstrations)], 29, seed=1)
    assert found.hidden.shape[0] == found.actions.shape[0] == found.episode.shape[0] == 29
    policy = make_policy("mini", checkpoint=str(checkpoint))
    paths = find_demonstrations([str(demonstrations)])
    labels = found.actions.view(29, CHUNK, 7)
    for row in (0, 14, 28):
        demo = read_demonstration(paths[int(found.episode[row])])
        starts = [
            start
            for start in range(len(demo.actions) - CHUNK + 1)
            if np.allclose(demo.actions[start : start + CHUNK], labels[row], atol=1e-6)
        ]
        answers = []
        for start in starts:
            images = {name: images[start] for name, images in demo.images.items()}
            images = {name: decode_image(one) if isinstance(one, bytes) else one for name, one in images.items()}
            policy.reset(demo.instruction)
            observation = Observation(images, {"eef_pos": demo.proprio["eef_pos"][start]})
            answers.append(policy.act(observation).action)
        with torch.no_grad():
            answer = policy.model.action_head(found.hidden[row].view(1, CHUNK, -1))[0, 0].clamp(-1, 1)
        assert min(float((answer - torch.from_numpy(other)).abs().max()) for other in answers) < 1e-4


def test_the_head_goes_through_the_same_arms(checkpoint, demonstrations, tmp_path):
    features = record_features(checkpoint, [str(demonstrations)], 30)
    options = {"width": 16, "depth": 1, "schedule": Schedule(50, 3, 1.0), "calibration": 32}
    config = ExperimentConfig(1, QuantiseConfig(distil=DistilConfig(updates=3, batch=8)))
    chosen = [arm for arm in ARMS if arm.name in ("full precision", "MSFP", "MSFP + TALoRA + DFA")]

    def run(**change):
        task = HeadTask(tmp_path, features, **{**options, "fit": FitConfig(steps=20, batch=16)} | change)
        return run_experiment(tmp_path, [task], config, lambda line: None, chosen)

    rows = run()
    assert [row["metrics"]["apart"] > 0 for row in rows] == [False, True, True]
    assert (tmp_path / "head-0.safetensors").is_file()
    assert run() == rows
    with pytest.raises(PolicyError, match="fit was"):
        run(fit=FitConfig(steps=21, batch=16))


def test_features_are_recorded_once_and_those_of_something_else_are_refused(checkpoint, demonstrations, tmp_path):
    path, folders = tmp_path / "features.safetensors", [str(demonstrations)]
    first = kept_features(path, checkpoint, folders, 12)
    assert torch.equal(first.hidden, record_features(checkpoint, folders, 12).hidden)
    written = path.stat().st_mtime_ns
    again = kept_features(path, checkpoint, folders, 12)
    assert path.stat().st_mtime_ns == written
    assert all(torch.equal(one, other) for one, other in zip(vars(first).values(), vars(again).values(), strict=True))
    with pytest.raises(PolicyError, match=r'"count": 12.* name another folder'):
        kept_features(path, checkpoint, folders, 13)


def test_a_model_without_slots_and_too_few_frames_are_refused(checkpoint, demonstrations, tiny):
    with pytest.raises(PolicyError, match="answers in tokens"):
        record_features(tiny, [str(demonstrations)], 8)
    with pytest.raises(PolicyError, match="100000 were asked for"):
        record_features(checkpoint, [str(demonstrations)], 100_000)
