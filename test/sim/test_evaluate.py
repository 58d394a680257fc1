"""Many episodes: real environments in worker processes, really killed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm.policy import ActionSpec, ActionStep, HoldPolicy, Observation
from sim.env import EnvConfig, LiberoEnv
from sim.errors import ConfigurationError, SimError
from sim.evaluate import EvalConfig, Execution, Progress, evaluate
from sim.results import RunFile
from sim.rollout import rollout
from sim.schedule import episode_keys

# Without cameras a scene takes no OpenGL, and four steps of physics take no time.
BLIND = EvalConfig(policy="hold", cameras=(), step_limit=4)
KEYS = episode_keys("libero_object", (0,), range(4))


class CountingPolicy:
    """Batched: the action of an episode's n-th step depends on n alone."""

    action_spec = ActionSpec()

    def __init__(self, fail_at: int = -1) -> None:
        self.batches: list[int] = []
        self.threads: set[int] = set()
        self._fail_at, self._begun = fail_at, 0

    def reset(self, instruction: str) -> None:
        raise AssertionError("an evaluation uses begin()")

    def act(self, observation: Observation) -> ActionStep:
        raise AssertionError("an evaluation uses act_batch()")

    def begin(self, instruction: str) -> dict[str, Any]:
        assert instruction
        self._begun += 1
        return {"step": 0, "fails": self._begun - 1 == self._fail_at}

    def act_batch(self, episodes: Sequence[Any], observations: Sequence[Observation]) -> list[ActionStep]:
        assert len(episodes) == len(observations)
        self.batches.append(len(episodes))
        self.threads.add(threading.get_ident())
        return [self._step(episode) for episode in episodes]

    @staticmethod
    def _step(episode: dict[str, Any]) -> ActionStep:
        if episode["fails"] and episode["step"] == 2:
            raise ZeroDivisionError("no wheels")
        episode["step"] += 1
        fresh = episode["step"] % 2 == 1
        action = np.full(7, episode["step"] / 10, np.float32)
        return ActionStep(action, {"decode": 0.5} if fresh else {}, {"reused": not fresh, "reason": f"{fresh}"})


def test_a_shared_policy_plays_what_a_rollout_plays(tmp_path: Path) -> None:
    policy = CountingPolicy()
    config = EvalConfig(policy="counting", cameras=(), step_limit=4)
    evaluate(tmp_path / "run", config, KEYS, Execution(workers=2), policy)
    assert policy.threads == {threading.get_ident()}
    with RunFile(tmp_path / "run") as run:
        episodes = list(run.episodes())
    assert [episode.key for episode in episodes] == KEYS
    expected = (np.arange(1, 5, dtype=np.float32) / np.float32(10))[:, None].repeat(7, 1)
    for episode in episodes:
        assert (episode.outcome, episode.steps, episode.error) == ("failure", 4, None)
        np.testing.assert_array_equal(episode.actions, expected)
        assert episode.latency["decode"] == {"mean": 0.5, "p50": 0.5, "p99": 0.5, "n": 2}
        assert {"policy", "physics", "render", "queue"} <= set(episode.latency)
        assert episode.flags["reused"] == {"mean": 0.5, "n": 4}
        assert episode.flags["reason"] == {"counts": {"False": 2, "True": 2}}
        assert {"mujoco", "renderer", "git_commit", "workers"} <= set(episode.provenance)


def test_max_batch_limits_a_call(tmp_path: Path) -> None:
    policy = CountingPolicy()
    config = EvalConfig(policy="counting", cameras=(), step_limit=4)
    evaluate(tmp_path / "run", config, KEYS, Execution(workers=2, max_batch=1), policy)
    assert policy.batches == [1] * 16


def test_an_error_of_the_policy_is_one_episode_s_error_with_its_traceback(tmp_path: Path) -> None:
    config = EvalConfig(policy="counting", cameras=(), step_limit=4)
    evaluate(tmp_path / "run", config, KEYS, Execution(workers=1), CountingPolicy(fail_at=1))
    with RunFile(tmp_path / "run") as run:
        episodes = list(run.episodes())
    assert [episode.outcome for episode in episodes] == ["failure", "error", "failure", "failure"]
    assert episodes[1].steps == 2
    assert "ZeroDivisionError: no wheels" in str(episodes[1].error)


def test_errors_are_kept_until_they_are_asked_for_again(tmp_path: Path) -> None:
    config = EvalConfig(policy="counting", cameras=(), step_limit=4)
    keys = KEYS[:2]
    evaluate(tmp_path / "run", config, keys, Execution(workers=1), CountingPolicy(fail_at=0))
    kept = evaluate(tmp_path / "run", config, keys, Execution(workers=1), CountingPolicy())
    assert list(kept.outcomes.values()) == ["error", "failure"]
    retried = evaluate(tmp_path / "run", config, keys, Execution(workers=1, retry_errors=True), CountingPolicy())
    assert sorted(retried.outcomes.values()) == ["failure", "failure"]


def test_many_errors_in_a_row_stop_the_evaluation_and_keep_what_was_finished(tmp_path: Path) -> None:
    class Broken(CountingPolicy):
        def begin(self, instruction: str) -> dict[str, Any]:
            raise ValueError("no engine")

    config = EvalConfig(policy="broken", cameras=(), step_limit=4)
    with pytest.raises(SimError, match=r"2 errors in a row(.|\n)*no engine"):
        evaluate(tmp_path / "run", config, KEYS, Execution(workers=1, error_limit=2), Broken())
    with RunFile(tmp_path / "run") as run:
        assert list(run.outcomes().values()) == ["error", "error"]


def test_a_policy_of_one_episode_is_made_for_each_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[HoldPolicy] = []

    def make(name: str, **options: Any) -> HoldPolicy:
        made.append(HoldPolicy())
        return made[-1]

    monkeypatch.setattr("sim.evaluate.make_policy", make)
    evaluate(tmp_path / "run", BLIND, KEYS, Execution(workers=2))
    assert len(made) == 2


def test_the_expert_runs_beside_its_environment_and_equals_its_rollout(tmp_path: Path) -> None:
    from sim.expert import make_expert

    config = EvalConfig(policy="expert", step_limit=6)
    evaluate(tmp_path / "run", config, KEYS[:2], Execution(workers=1))
    env = LiberoEnv(EnvConfig(suite="libero_object", task=0, cameras=(), step_limit=6))
    try:
        expected = rollout(env, make_expert(env), init_state=1)
    finally:
        env.close()
    with RunFile(tmp_path / "run") as run:
        _, second = run.episodes()
    np.testing.assert_array_equal(second.actions, expected.actions)
    assert second.flags["phase"] == {"counts": {"approach": 6}}


def killing(victim: Any) -> Any:
    def deed(progress: Progress) -> None:
        if progress.done == 1:
            victim()

    return deed


def test_a_killed_worker_is_one_error_and_the_rest_is_played(tmp_path: Path) -> None:
    def kill_the_worker() -> None:
        (child,) = Path(f"/proc/{os.getpid()}/task/{worker_thread()}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)

    def worker_thread() -> int:
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "episodes"]
        assert thread.native_id is not None
        return thread.native_id

    evaluate(tmp_path / "run", BLIND, KEYS, Execution(workers=1), on_progress=killing(kill_the_worker))
    with RunFile(tmp_path / "run") as run:
        episodes = list(run.episodes())
    outcomes = [episode.outcome for episode in episodes]
    assert sorted(outcomes) == ["error", "failure", "failure", "failure"]
    assert "died of SIGKILL" in str(episodes[outcomes.index("error")].error)


def test_an_interrupt_keeps_what_was_finished_and_the_same_call_goes_on(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    policy = CountingPolicy()
    config = EvalConfig(policy="counting", cameras=(), step_limit=4)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "run", config, KEYS, Execution(workers=1), policy, killing(interrupt))
    with RunFile(tmp_path / "run") as run:
        before = {episode.key: episode.finished for episode in run.episodes()}
    assert 1 <= len(before) < 4
    assert "episodes" not in [thread.name for thread in threading.enumerate()]
    evaluate(tmp_path / "run", config, KEYS, Execution(workers=1), policy)
    with RunFile(tmp_path / "run") as run:
        after = {episode.key: episode.finished for episode in run.episodes()}
    assert list(after) == KEYS
    assert before.items() <= after.items()


def test_a_run_of_another_policy_is_refused(tmp_path: Path) -> None:
    evaluate(tmp_path / "run", BLIND, [])
    evaluate(tmp_path / "run", BLIND, KEYS[:1], Execution(workers=1))
    other = EvalConfig(policy="counting", cameras=(), step_limit=4)
    with pytest.raises(ConfigurationError, match=r"policy\.name was 'hold', is 'counting'"):
        evaluate(tmp_path / "run", other, KEYS, policy=CountingPolicy())


def test_an_impossible_environment_stops_the_evaluation_with_its_reason(tmp_path: Path) -> None:
    config = EvalConfig(policy="hold", cameras=("nowhere",), step_limit=4)
    with pytest.raises(ConfigurationError, match="nowhere"):
        evaluate(tmp_path / "run", config, KEYS)


class RenderedPolicy(HoldPolicy):
    render: Mapping[str, Any] = {"renderer": "fast", "image_size": 32, "cameras": ["agentview"]}


def test_a_policy_says_how_it_is_to_be_rendered_and_failures_are_recorded(tmp_path: Path) -> None:
    import av

    config = EvalConfig(policy="rendered", step_limit=3)
    evaluate(tmp_path / "run", config, KEYS[:1], Execution(workers=1, record_failures=True), RenderedPolicy())
    with RunFile(tmp_path / "run") as run:
        (episode,) = run.episodes(videos=True)
        stored = run.configurations()[""]["env"]
    assert (stored["renderer"], stored["image_size"], stored["cameras"]) == ("fast", 32, ["agentview"])
    assert episode.provenance["renderer"] == "fast"
    assert episode.video is not None
    import io

    with av.open(io.BytesIO(episode.video)) as video:
        frames = list(video.decode(video=0))
    assert [(frame.width, frame.height) for frame in frames] == [(32, 32)] * 3


def test_another_rendering_than_the_policy_s_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="made for image_size 32 and is evaluated with 64"):
        env = EvalConfig(policy="rendered", image_size=64).env(RenderedPolicy())
    assert (env.image_size, env.renderer) == (64, "fast")


def test_an_unknown_rendering_wish_is_refused() -> None:
    class Odd(HoldPolicy):
        render: Mapping[str, Any] = {"shadows": True}

    with pytest.raises(ConfigurationError, match="'shadows'"):
        EvalConfig(policy="odd").env(Odd())
