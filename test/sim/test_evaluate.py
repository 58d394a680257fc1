"""Many episodes in real worker processes, really killed. Most of them play a toy, which is quicker than LIBERO."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm.policy import ActionSpec, ActionStep, HoldPolicy, Observation
from sim.env import EnvConfig, LiberoEnv
from sim.errors import ConfigurationError, SimError
from sim.evaluate import EvalConfig, Execution, evaluate
from sim.expert_env import ExpertEnv
from sim.ledger import Progress
from sim.results import EpisodeResult, RunFile
from sim.rollout import rollout
from sim.schedule import episode_keys
from sim.versions import git_commit

CONFIG = EvalConfig(policy="counting", cameras=(), step_limit=4)
KEYS = episode_keys("libero_object", (0,), range(4))
OUTCOMES = ["success", "failure", "success", "failure"]  # of the toy


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # worker processes find it too
    from toy_env import ToyEnv

    monkeypatch.setattr("sim.evaluate.LiberoEnv", ToyEnv)


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
        if episode["fails"] and episode["step"] == 1:
            raise ZeroDivisionError("no wheels")
        episode["step"] += 1
        fresh = episode["step"] % 2 == 1
        action = np.full(7, episode["step"] / 10, np.float32)
        return ActionStep(action, {"decode": 0.5} if fresh else {}, {"reused": not fresh, "reason": f"{fresh}"})


def episodes_of(path: Path) -> list[EpisodeResult]:
    with RunFile(path) as run:
        return list(run.episodes(videos=True))


def test_a_shared_policy_answers_from_one_thread_and_every_step_is_kept(tmp_path: Path) -> None:
    policy = CountingPolicy()
    evaluate(tmp_path / "run", CONFIG, KEYS, Execution(workers=2), policy)
    assert policy.threads == {threading.get_ident()}
    episodes = episodes_of(tmp_path / "run")
    assert [episode.key for episode in episodes] == KEYS
    assert [episode.outcome for episode in episodes] == OUTCOMES
    expected = (np.arange(1, 5, dtype=np.float32) / np.float32(10))[:, None].repeat(7, 1)
    for episode, steps in zip(episodes, (3, 4, 3, 4), strict=True):
        np.testing.assert_array_equal(episode.actions, expected[:steps])
        assert episode.latency["decode"] == {"mean": 0.5, "p50": 0.5, "p99": 0.5, "n": 2}
        assert episode.latency["physics"]["mean"] == 0.25
        assert {"policy", "queue", "render"} <= set(episode.latency)
        assert episode.flags["reused"] == {"mean": pytest.approx((steps - 2) / steps), "n": steps}
        assert episode.flags["reason"] == {"counts": {"False": steps - 2, "True": 2}}
        assert {"mujoco", "renderer", "workers"} <= set(episode.provenance)
        commits = episode.provenance["git_commit"], episode.provenance["env_git_commit"]
        assert commits == (git_commit(), "of the toy")


def test_a_policy_answers_one_episode_a_call_unless_told_otherwise(tmp_path: Path) -> None:
    policy = CountingPolicy()
    evaluate(tmp_path / "run", CONFIG, KEYS, Execution(workers=2), policy)
    assert set(policy.batches) == {1}


def test_a_policy_is_warmed_up_before_its_first_episode_and_not_for_nothing(tmp_path: Path) -> None:
    class Cold(CountingPolicy):
        warmed = 0

        def warm_up(self) -> None:
            assert not self._begun
            self.warmed += 1

    first, second = Cold(), Cold()
    for policy in (first, second):
        evaluate(tmp_path / "run", CONFIG, KEYS[:2], Execution(workers=1), policy)
    assert (first.warmed, second.warmed) == (1, 0)


def test_an_error_of_the_policy_is_one_episode_s_error_with_its_traceback(tmp_path: Path) -> None:
    evaluate(tmp_path / "run", CONFIG, KEYS, Execution(workers=1), CountingPolicy(fail_at=1))
    episodes = episodes_of(tmp_path / "run")
    assert [episode.outcome for episode in episodes] == ["success", "error", "success", "failure"]
    assert episodes[1].steps == 1
    assert "ZeroDivisionError: no wheels" in str(episodes[1].error)


def test_errors_are_kept_until_they_are_asked_for_again(tmp_path: Path) -> None:
    keys = KEYS[:2]
    evaluate(tmp_path / "run", CONFIG, keys, Execution(workers=1), CountingPolicy(fail_at=0))
    kept = evaluate(tmp_path / "run", CONFIG, keys, Execution(workers=1), CountingPolicy())
    assert list(kept.outcomes.values()) == ["error", "failure"]
    retried = evaluate(tmp_path / "run", CONFIG, keys, Execution(workers=1, retry_errors=True), CountingPolicy())
    assert sorted(retried.outcomes.values()) == ["failure", "success"]


def test_many_errors_in_a_row_stop_the_evaluation_and_keep_what_was_finished(tmp_path: Path) -> None:
    class Broken(CountingPolicy):
        def begin(self, instruction: str) -> dict[str, Any]:
            raise ValueError("no engine")

    with pytest.raises(SimError, match=r"2 errors in a row(.|\n)*no engine"):
        evaluate(tmp_path / "run", CONFIG, KEYS, Execution(workers=1, error_limit=2), Broken())
    assert [episode.outcome for episode in episodes_of(tmp_path / "run")] == ["error", "error"]


def test_a_policy_of_one_episode_is_made_for_each_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[HoldPolicy] = []

    def make(name: str, **options: Any) -> HoldPolicy:
        made.append(HoldPolicy())
        return made[-1]

    monkeypatch.setattr("sim.evaluate.make_policy", make)
    evaluate(tmp_path / "run", EvalConfig(policy="hold", cameras=(), step_limit=4), KEYS, Execution(workers=2))
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
    _, second = episodes_of(tmp_path / "run")
    np.testing.assert_array_equal(second.actions, expected.actions)
    assert second.flags["phase"] == {"counts": {"approach": 6}}
    assert {"mujoco", "robosuite", "git_commit"} <= set(second.provenance)
    assert "env_git_commit" not in second.provenance


def test_the_expert_goes_to_what_each_shuffled_episode_asks_for() -> None:
    env = ExpertEnv(EnvConfig(suite="libero_object", task=0, cameras=(), settle_steps=0))
    asked = set()
    try:
        for seed in range(4):
            observation, _ = env.reset(seed=seed, options={"init_state": "shuffled"})
            env.expert_reset(env.task.language)
            env.expert_act()
            world = env.privileged()
            ((_, item, _),) = world.goal
            hand, lies = observation["proprio"]["eef_pos"], world.data.xpos[world.body_ids[item]]
            assert np.linalg.norm((hand + env._expert.targets[:3] - lies)[:2]) < 0.03
            asked.add(item)
    finally:
        env.close()
    assert len(asked) > 1


def after_one(deed: Callable[[], None]) -> Callable[[Progress], None]:
    return lambda progress: deed() if progress.done == 1 else None


def test_a_killed_worker_is_one_error_and_the_rest_is_played(tmp_path: Path) -> None:
    def kill_the_worker() -> None:
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "episodes"]
        (child,) = Path(f"/proc/{os.getpid()}/task/{thread.native_id}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)

    # The policy answers in the thread that kills, so that the worker dies in the middle of an episode.
    evaluate(
        tmp_path / "run", CONFIG, KEYS, Execution(workers=1), CountingPolicy(), on_progress=after_one(kill_the_worker)
    )
    episodes = episodes_of(tmp_path / "run")
    assert [episode.outcome for episode in episodes] == ["success", "error", "success", "failure"]
    assert "died of SIGKILL" in str(episodes[1].error)


def test_an_interrupt_keeps_what_was_finished_and_the_same_call_goes_on(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "run", CONFIG, KEYS, Execution(workers=1), CountingPolicy(), after_one(interrupt))
    assert "episodes" not in [thread.name for thread in threading.enumerate()]
    before = {episode.key: episode.finished for episode in episodes_of(tmp_path / "run")}
    assert len(before) == 1
    evaluate(tmp_path / "run", CONFIG, KEYS, Execution(workers=1), CountingPolicy())
    after = {episode.key: episode.finished for episode in episodes_of(tmp_path / "run")}
    assert list(after) == KEYS
    assert before.items() <= after.items()


def test_a_run_of_another_policy_is_refused(tmp_path: Path) -> None:
    evaluate(tmp_path / "run", CONFIG, KEYS[:1], Execution(workers=1), CountingPolicy())
    other = EvalConfig(policy="hold", cameras=(), step_limit=4)
    with pytest.raises(ConfigurationError, match=r"policy\.name was 'counting', is 'hold'"):
        evaluate(tmp_path / "run", other, KEYS)


def test_another_checkpoint_under_the_same_name_is_refused(tmp_path: Path) -> None:
    policy = CountingPolicy()
    for digest, refused in (("aa", False), ("bb", True)):
        policy.provenance = {"checkpoint_sha256": digest}  # type: ignore[attr-defined]
        if refused:
            with pytest.raises(ConfigurationError, match="checkpoint_sha256 was 'aa', is 'bb'"):
                evaluate(tmp_path / "run", CONFIG, KEYS[:2], Execution(workers=1), policy)
        else:
            evaluate(tmp_path / "run", CONFIG, KEYS[:1], Execution(workers=1), policy)


def test_a_checkpoint_that_was_trained_anew_under_its_name_is_refused(tiny: Path, tmp_path: Path) -> None:
    from mllm.checkpoint import load_checkpoint, save_checkpoint
    from mllm.vla import init_random

    folder, run, cameras = tmp_path / "policy", tmp_path / "run", ("agentview", "robot0_eye_in_hand")
    shutil.copytree(tiny, folder)
    plain = EvalConfig(policy=str(folder), cameras=cameras, step_limit=1)
    beneath = {"policy": str(folder), "options": {}}
    configs = {"": plain, "blind": dataclasses.replace(plain, policy="blind", options=beneath)}
    configs["reuse"] = dataclasses.replace(plain, options={"reuse": "gated"})
    keys = [dataclasses.replace(KEYS[0], variant=variant) for variant in configs]
    evaluate(run, configs, keys, Execution(workers=1))
    with RunFile(run) as played:
        said = [played.configurations()[variant]["policy"]["provenance"] for variant in configs]
    assert [len(one["weights_sha256"]) for one in said] == [64] * 3
    assert said[0] == said[1] == said[2]
    model, tokenizer = load_checkpoint(folder)
    save_checkpoint(folder, init_random(model, 1), tokenizer)
    for variant, config in configs.items():
        key = dataclasses.replace(KEYS[1], variant=variant)
        with pytest.raises(ConfigurationError, match=rf"weights_sha256 was '{said[0]['weights_sha256']}', is '"):
            evaluate(run, {variant: config}, [key], Execution(workers=1))


def test_a_run_that_does_not_say_its_weights_is_not_gone_on_with(tmp_path: Path) -> None:
    evaluate(tmp_path / "run", CONFIG, KEYS[:1], Execution(workers=1), CountingPolicy())
    policy = CountingPolicy()
    policy.provenance = {"weights_sha256": "aa"}  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match=r"policy\.provenance was None, is {'weights_sha256': 'aa'}"):
        evaluate(tmp_path / "run", CONFIG, KEYS[:2], Execution(workers=1), policy)


def test_an_impossible_environment_stops_the_evaluation_with_its_reason(tmp_path: Path) -> None:
    config = EvalConfig(policy="hold", cameras=("nowhere",), step_limit=4)
    with pytest.raises(ConfigurationError, match="nowhere"):
        evaluate(tmp_path / "run", config, KEYS)


class RenderedPolicy(HoldPolicy):
    render: Mapping[str, Any] = {"renderer": "fast", "image_size": 32, "cameras": ["agentview", "robot0_eye_in_hand"]}


class SparingPolicy(RenderedPolicy):
    """Never looks again."""

    def act(self, observation: Observation) -> ActionStep:
        return dataclasses.replace(super().act(observation), looks=False)


@pytest.mark.parametrize("policy", [RenderedPolicy(), SparingPolicy()], ids=["looks", "does not look"])
def test_a_policy_says_how_it_is_to_be_rendered_and_failures_are_recorded(
    policy: RenderedPolicy, tmp_path: Path
) -> None:
    import av

    config = EvalConfig(policy="rendered", step_limit=4)
    evaluate(tmp_path / "run", config, KEYS[:1], Execution(workers=1, record_failures=True), policy)
    (episode,) = episodes_of(tmp_path / "run")
    with RunFile(tmp_path / "run") as run:
        stored = run.configurations()[""]["env"]
    assert (stored["renderer"], stored["image_size"], len(stored["cameras"])) == ("fast", 32, 2)
    assert episode.provenance["renderer"] == "fast"
    assert episode.video is not None
    with av.open(io.BytesIO(episode.video)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert [frame.shape for frame in frames] == [(32, 64, 3)] * 4
    assert [round(frame.mean() / 40) for frame in frames] == [0, 1, 2, 3]


def test_another_rendering_than_the_policy_s_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="made for image_size 32 and is evaluated with 64"):
        env = EvalConfig(policy="rendered", image_size=64).env(RenderedPolicy())
    assert (env.image_size, env.renderer) == (64, "fast")


def test_an_unknown_rendering_wish_is_refused() -> None:
    class Odd(HoldPolicy):
        render: Mapping[str, Any] = {"shadows": True}

    with pytest.raises(ConfigurationError, match="'shadows'"):
        EvalConfig(policy="odd").env(Odd())


@pytest.mark.parametrize(
    ("field", "value"), [("workers", 0), ("max_batch", 0), ("in_a_row", 5000), ("executor", "cloud")]
)
def test_a_wrong_execution_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=field):
        Execution(**{field: value})
