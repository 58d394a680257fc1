"""A worker that dies, hangs or is abandoned: real processes, really killed."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from mllm.policy import ActionSpec, ActionStep, HoldPolicy, Observation
from sim.env import EnvConfig
from sim.errors import ConfigurationError, EnvironmentFault
from sim.rollout import rollout
from sim.supervisor import SupervisedEnv

CONFIG = EnvConfig(suite="libero_object", task=0, cameras=(), step_limit=4)


@pytest.fixture(scope="module")
def env() -> Iterator[SupervisedEnv]:
    with SupervisedEnv(CONFIG, call_limit=20.0) as made:
        yield made


class ActingPolicy(HoldPolicy):
    """Holds still, and calls `deed` in its third step."""

    action_spec = ActionSpec()

    def __init__(self, deed: Callable[[], None]) -> None:
        self._deed, self._steps = deed, 0

    def act(self, observation: Observation) -> ActionStep:
        self._steps += 1
        if self._steps == 3:
            self._deed()
        return super().act(observation)


def test_an_episode_runs_in_the_worker(env: SupervisedEnv) -> None:
    episode = rollout(env, HoldPolicy(), record_states=True)
    assert episode.error is None
    assert (episode.outcome, episode.steps) == ("failure", 4)
    assert episode.states is not None
    assert episode.states.shape[0] == 5
    assert episode.provenance["mujoco"]
    assert env.worker_pid not in (None, os.getpid())


def test_an_unknown_initial_state_raises_and_keeps_the_worker(env: SupervisedEnv) -> None:
    before = env.worker_pid
    with pytest.raises(ConfigurationError, match="choose 0 to 49"):
        rollout(env, HoldPolicy(), init_state=50)
    assert env.worker_pid == before


def test_a_killed_worker_is_an_error_and_the_next_episode_equals_one_before_it(env: SupervisedEnv) -> None:
    before = rollout(env, HoldPolicy(), record_states=True)
    pid = env.worker_pid
    assert pid is not None
    killed = rollout(env, ActingPolicy(lambda: os.kill(pid, signal.SIGKILL)))
    assert (killed.outcome, killed.steps) == ("error", 2)
    assert "died of SIGKILL during step()" in str(killed.error)
    after = rollout(env, HoldPolicy(), record_states=True)
    assert env.worker_pid not in (None, pid)
    np.testing.assert_array_equal(after.states, before.states)


def test_a_hung_worker_is_killed_and_named_in_the_error(env: SupervisedEnv) -> None:
    env.reset()
    pid = env.worker_pid
    assert pid is not None

    def stop() -> None:
        env._call_limit = 0.5  # from here on: the reset takes as long as a busy machine lets it
        os.kill(pid, signal.SIGSTOP)

    hung = rollout(env, ActingPolicy(stop))
    assert hung.outcome == "error"
    assert "did not answer step() within 0.5 s" in str(hung.error)
    assert env.worker_pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_step_without_a_worker_says_to_reset() -> None:
    with pytest.raises(EnvironmentFault, match="call reset"):
        SupervisedEnv(CONFIG).step(np.zeros(7))


def test_a_worker_that_cannot_build_its_scene_raises_why() -> None:
    env = SupervisedEnv(EnvConfig(cameras=("nowhere",)))
    with pytest.raises(ConfigurationError, match="nowhere"):
        env.reset()
    assert env.worker_pid is None


def test_a_worker_dies_with_its_parent() -> None:
    code = (
        "import os, signal\n"
        "from sim.env import EnvConfig\n"
        "from sim.supervisor import SupervisedEnv\n"
        "env = SupervisedEnv(EnvConfig(suite='libero_object', cameras=()))\n"
        "env.reset()\n"
        "print(env.worker_pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    watched, ended = os.pipe()  # reads end-of-file when the last process that holds `ended` is gone
    parent = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=ended,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    os.close(ended)
    assert parent.returncode == -signal.SIGKILL
    gone = threading.Event()

    def drain() -> None:
        with os.fdopen(watched, "rb") as stream:
            stream.read()
        gone.set()

    threading.Thread(target=drain, daemon=True).start()
    assert gone.wait(timeout=30), f"worker {parent.stdout.decode().strip()} outlived its parent"
