"""Three outcomes, and what an episode keeps."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from mllm.policy import ActionSpec, ActionStep, HoldPolicy, Observation
from sim.bench import sample_actions
from sim.env import EnvConfig, LiberoEnv
from sim.errors import ConfigurationError
from sim.rollout import rollout


class ListPolicy:
    """Plays back given actions; an exception in the list is raised."""

    def __init__(self, answers: list[object], action_spec: ActionSpec | None = None) -> None:
        self.action_spec = action_spec or ActionSpec()
        self.answers, self.instruction, self.stamps = answers, "", []  # type: ignore[var-annotated]

    def reset(self, instruction: str) -> None:
        self.instruction = instruction
        self.stamps = []

    def act(self, observation: Observation) -> ActionStep:
        answer = self.answers[len(self.stamps)]
        self.stamps.append(observation.stamp)
        if isinstance(answer, BaseException):
            raise answer
        return ActionStep(action=answer)  # type: ignore[arg-type]


class StovePolicy(HoldPolicy):
    """Turns the stove's knob by privileged means in its second step."""

    def __init__(self, env: LiberoEnv) -> None:
        self._env = env

    def act(self, observation: Observation) -> ActionStep:
        if observation.stamp > 0:
            privileged = self._env.privileged()
            privileged.data.qpos[privileged.model.joint("flat_stove_1_button").qposadr] = 2.0
        return super().act(observation)


def test_an_episode_without_the_goal_is_a_failure_at_the_step_limit(env: LiberoEnv) -> None:
    policy = ListPolicy(list(sample_actions(5)))
    episode = rollout(env, policy, init_state=2, record_states=True)
    assert (episode.outcome, episode.steps, episode.error) == ("failure", 5, None)
    assert (episode.suite, episode.task, episode.init_state) == ("libero_goal", 7, 2)
    assert policy.instruction == episode.language == "turn on the stove"
    assert policy.stamps == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    np.testing.assert_array_equal(episode.actions, sample_actions(5))
    assert episode.states is not None
    assert len(episode.states) == 6
    assert {name: len(seconds) for name, seconds in episode.timing.items()} == dict.fromkeys(
        ("policy", "physics", "render"), 5
    )


class SparingPolicy(ListPolicy):
    """Looks at every other observation, or at all of them, and keeps what it was shown."""

    def __init__(self, answers: list[object], every: bool) -> None:
        super().__init__(answers)
        self.every, self.shown = every, []  # type: ignore[var-annotated]

    def act(self, observation: Observation) -> ActionStep:
        self.shown.append(observation.images)
        return replace(super().act(observation), looks=self.every or len(self.shown) % 2 == 0)


def test_images_that_nobody_looks_at_are_not_drawn_and_nothing_else_changes() -> None:
    env = LiberoEnv(EnvConfig("libero_goal", 7, ("agentview",), 64, "fast", step_limit=4))
    with closing(env):
        policies = [SparingPolicy(list(sample_actions(4)), every) for every in (True, False)]
        full, sparing = (rollout(env, policy, record_states=True) for policy in policies)
    np.testing.assert_array_equal(sparing.states, full.states)
    all_of_them, some = (policy.shown for policy in policies)
    assert [len(images) for images in all_of_them] == [1, 1, 1, 1]
    assert [len(images) for images in some] == [1, 0, 1, 0]
    np.testing.assert_array_equal(some[2]["agentview"], all_of_them[2]["agentview"])


def test_reaching_the_goal_is_a_success(env: LiberoEnv) -> None:
    episode = rollout(env, StovePolicy(env))
    assert (episode.outcome, episode.steps) == ("success", 2)


def test_recorded_actions_replay_to_the_same_states(env: LiberoEnv) -> None:
    first = rollout(env, ListPolicy(list(sample_actions(5))), init_state=6, record_states=True)
    recording = first.recording()
    assert recording.metadata["init_state"] == "6"
    again = rollout(env, ListPolicy(list(recording.actions)), init_state=6, record_states=True)
    np.testing.assert_array_equal(again.states, first.states)


def test_an_exception_of_the_policy_is_an_error_with_its_traceback(env: LiberoEnv) -> None:
    episode = rollout(env, ListPolicy([np.zeros(7), ZeroDivisionError("no wheels")]))
    assert (episode.outcome, episode.steps) == ("error", 1)
    assert "ZeroDivisionError: no wheels" in str(episode.error)


def test_an_impossible_action_is_an_error_that_names_it(env: LiberoEnv) -> None:
    episode = rollout(env, ListPolicy([np.full(7, np.nan)]))
    assert episode.outcome == "error"
    assert "action[0] is nan" in str(episode.error)


def test_ctrl_c_is_not_an_episode(env: LiberoEnv) -> None:
    with pytest.raises(KeyboardInterrupt):
        rollout(env, ListPolicy([KeyboardInterrupt()]))


def test_a_policy_with_other_actions_is_refused_before_the_episode(env: LiberoEnv) -> None:
    with pytest.raises(ConfigurationError, match="control_freq=10"):
        rollout(env, ListPolicy([], ActionSpec(control_freq=10)))


def test_an_unknown_initial_state_is_refused_not_an_error_episode(env: LiberoEnv) -> None:
    with pytest.raises(ConfigurationError, match="choose 0 to 49"):
        rollout(env, HoldPolicy(), init_state=99)
