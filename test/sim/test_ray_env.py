"""The same evaluation on a Ray cluster of two workers on this machine."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.env import EnvConfig
from sim.errors import ConfigurationError, EnvironmentFault
from sim.evaluate import EvalConfig, Execution, evaluate
from sim.results import RunFile
from sim.schedule import episode_keys

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'flashvla_ros[ray]'")

from sim.ray_env import RayEnv  # noqa: E402, needs Ray

CONFIG = EnvConfig(suite="libero_object", cameras=(), step_limit=4)


@pytest.fixture(scope="module")
def toy() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        from toy_env import ToyEnv

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        yield ToyEnv
        ray.shutdown()


def test_an_evaluation_on_ray_equals_one_in_processes(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sim.evaluate.LiberoEnv", toy)
    keys = episode_keys("libero_object", (0, 1), range(2))
    runs = []
    for executor in ("process", "ray"):
        config = EvalConfig(policy="hold", cameras=(), step_limit=4)
        evaluate(tmp_path / executor, config, keys, Execution(workers=2, executor=executor))
        with RunFile(tmp_path / executor) as run:
            runs.append(list(run.episodes()))
    for one, other in zip(*runs, strict=True):
        assert (one.key, one.outcome, one.steps, one.error) == (other.key, other.outcome, other.steps, None)
        np.testing.assert_array_equal(one.actions, other.actions)
    assert {episode.provenance["executor"] for episode in runs[1]} == {"ray"}


@pytest.fixture(scope="module")
def env(toy: Any) -> Iterator[RayEnv]:
    made = RayEnv(CONFIG, factory=toy)
    yield made
    made.close()


def test_a_killed_environment_is_a_fault_and_its_place_stays(env: RayEnv) -> None:
    env.reset(options={"init_state": 0})
    os.kill(ray.get(env._actor.__ray_call__.remote(lambda supervised: supervised.worker_pid)), signal.SIGKILL)
    with pytest.raises(EnvironmentFault, match=r"worker .* during step\(\)"):
        env.step(np.zeros(7))
    place = env._actor
    env.reset(options={"init_state": 0})
    assert env._actor is place
    env.step(np.zeros(7))


def test_a_lost_place_is_a_fault_and_the_next_reset_finds_another(env: RayEnv) -> None:
    env.reset(options={"init_state": 0})
    os.kill(ray.get(env._actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    with pytest.raises(EnvironmentFault, match="lost during step"):
        env.step(np.zeros(7))
    env.reset(options={"init_state": 0})
    env.step(np.zeros(7))


def test_a_wrong_configuration_is_said_as_such(toy: Any) -> None:
    env = RayEnv(EnvConfig(suite="libero_object", cameras=("nowhere",)), factory=toy)
    try:
        with pytest.raises(ConfigurationError, match="nowhere"):
            env.reset()
    finally:
        env.close()


def test_a_call_before_reset_says_to_reset(toy: Any) -> None:
    with pytest.raises(EnvironmentFault, match="call reset"):
        RayEnv(CONFIG, factory=toy).step(np.zeros(7))
