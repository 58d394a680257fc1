"""A sweep plays each arm on the same episodes, and what is there it does not play again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from mllm.demonstrations import write_demonstration
from mllm.policy import ActionSpec, ActionStep, Observation
from mllm.sweep import Arm, draw_clips, grid
from sim.env import EnvConfig
from sim.errors import ConfigurationError
from sim.evaluate import EvalConfig, Execution
from sim.ledger import Progress
from sim.results import RunFile
from sim.schedule import episode_keys
from sim.standings import REFERENCE, standings
from sim.supervisor import SupervisedEnv
from sim.sweep import closed_loop, open_loop

CONFIG = EvalConfig(policy="toy", cameras=(), step_limit=4)
KEYS = episode_keys("libero_object", (0, 1), range(2))
ARMS = grid(("flashvla",), (64, 80), ("off",))


class ToyPolicy:
    """Goes slowly enough with few tokens that the toy's even states take all their steps."""

    action_spec = ActionSpec()

    def __init__(self, compress: str = "none", keep: int = 128) -> None:
        self._keep = keep

    def reset(self, instruction: str) -> None:
        pass

    def act(self, observation: Observation) -> ActionStep:
        return ActionStep(np.full(7, self._keep / 256, np.float32), {}, {"flops": 10 * self._keep})


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every policy that is made."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # worker processes find it too
    from toy_env import ToyEnv

    options: list[dict[str, Any]] = []

    def make(name: str, **given: Any) -> ToyPolicy:
        options.append(given)
        return ToyPolicy(**given)

    monkeypatch.setattr("sim.evaluate.LiberoEnv", ToyEnv)
    monkeypatch.setattr("sim.evaluate.make_policy", make)
    return options


def stored(path: Path) -> dict[Any, str]:
    with RunFile(path) as run:
        return {episode.key: episode.finished for episode in run.episodes()}


def play(path: Path, arms: list[Arm] = ARMS, config: EvalConfig = CONFIG, **more: Any) -> Progress:
    return closed_loop(path, config, arms, KEYS, Execution(workers=1), **more)


def test_every_arm_plays_the_same_episodes_and_a_stopped_sweep_plays_nothing_twice(tmp_path: Path, made: Any) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "run", on_progress=interrupt)
    before = stored(tmp_path / "run")
    planned = [replace(key, variant=arm.name) for key in KEYS for arm in ARMS]
    assert set(before) == set(planned[: len(before)])
    counted: list[int] = []
    play(tmp_path / "run", on_progress=lambda progress: counted.append(progress.done))
    after = stored(tmp_path / "run")
    assert counted == list(range(len(before), 13))
    assert before.items() <= after.items()
    assert set(after) == set(planned)
    made.clear()
    assert play(tmp_path / "run").done == 12
    assert stored(tmp_path / "run") == after
    assert made == [arm.options for arm in ARMS]  # only to see that nothing has changed


def test_all_arms_play_a_scene_in_one_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []

    class Counted(SupervisedEnv):
        def __init__(self, config: EnvConfig, *rest: Any) -> None:
            built.append(int(config.task))
            super().__init__(config, *rest)

    monkeypatch.setattr("sim.evaluate.SupervisedEnv", Counted)
    play(tmp_path / "run")
    assert built == [0, 1]


def test_another_arm_is_added_to_what_is_there(tmp_path: Path) -> None:
    play(tmp_path / "run", ARMS[:1])
    before = stored(tmp_path / "run")
    play(tmp_path / "run", ARMS[:2])
    after = stored(tmp_path / "run")
    assert before.items() <= after.items()
    assert len(after) == 2 * len(before) == 8


def test_a_finished_sweep_under_another_configuration_is_refused(tmp_path: Path) -> None:
    play(tmp_path / "run", ARMS[:1])
    with pytest.raises(ConfigurationError, match=r"env\.step_limit was 4, is 5"):
        play(tmp_path / "run", ARMS[:1], replace(CONFIG, step_limit=5))


def test_arms_stand_beside_the_reference_with_what_they_reach_and_cost(tmp_path: Path) -> None:
    play(tmp_path / "run")
    with RunFile(tmp_path / "run") as run:
        found = standings({arm.name: list(run.episodes(arm.name)) for arm in ARMS})
    assert [one.variant for one in found] == [REFERENCE, "flashvla-64-off", "flashvla-80-off"]
    assert [one.successes for one in found] == [2, 0, 2]  # 64 of 256 is not above the toy's 0.25
    assert [one.flops for one in found] == [1280, 640, 800]
    few = found[1].against
    assert few is not None
    assert (few.n, len(few.only_a), len(few.only_b)) == (4, 2, 0)
    assert few.relative_flops is not None
    assert few.relative_flops.value == -0.5


def test_on_recorded_clips_an_arm_that_keeps_all_is_exactly_the_reference(
    tmp_path: Path, make_demonstration: Any
) -> None:
    for seed in range(2):
        demo = make_demonstration(4, seed, size=128)
        write_demonstration(tmp_path / f"seed_{seed:08}.hdf5", demo)
    clips = draw_clips(tmp_path, 2, 4)
    rows = list(open_loop("mini", {"seed": 0}, grid(("flashvla",), (128, 32), ("off",)), clips, resamples=200))
    first, whole, few = json.loads(json.dumps(rows))
    nothing = {"mean": 0.0, "interval": [0.0, 0.0]}
    for row in (first, whole):
        assert (row["error"], row["gripper"], row["clips"]) == (nothing, nothing, [0.0, 0.0])
        assert row["agreement"] == {"mean": 1.0, "interval": [1.0, 1.0]}
        assert (row["visual_flops_share"], row["reused"]) == (1, 0)
    assert (first["overlap"], whole["overlap"], whole["chance"]) == (None, 1, 1)
    assert first["flops_share"] == 1 < whole["flops_share"]  # choosing costs too
    assert few["error"]["interval"][0] <= few["error"]["mean"] == np.mean(few["clips"]) > 0
    assert few["chance"] == 0.25
    assert few["visual_flops_share"] < few["flops_share"] < 1
