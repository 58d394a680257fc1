"""When a policy is reset, what its answers may be, and the thread that owns it."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from mllm.errors import PolicyError
from mllm.policy import ActionSpec, ActionStep, HoldPolicy, Observation
from mllm.server_episode import Episode, PolicyThread, build, check_actions
from mllm.server_request import Request, RequestError

OBSERVATION = Observation({"front": np.zeros((2, 2, 3), np.uint8)})


class Scripted:
    """Answers with what it is given, raises what it is given; `calls` is what was asked of it."""

    action_spec = ActionSpec()

    def __init__(self, *answers):
        self.answers = list(answers)
        self.calls = []

    def reset(self, instruction):
        self.calls.append(instruction)

    def act(self, observation):
        self.calls.append("act")
        answer = self.answers.pop(0) if self.answers else np.zeros(7)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, ActionStep) else ActionStep(answer)


def observe(prompt=None, reset=False):
    return Request(OBSERVATION, prompt, reset)


def test_a_prompt_resets_once():
    policy = Scripted()
    episode = Episode(policy)
    for _ in range(2):
        episode.answer(observe("pick"))
    assert policy.calls == ["pick", "act", "act"]


def test_another_prompt_resets():
    policy = Scripted()
    episode = Episode(policy)
    for prompt in ("pick", "place", "pick"):
        episode.answer(observe(prompt))
    assert policy.calls == ["pick", "act", "place", "act", "pick", "act"]


def test_without_a_prompt_the_episode_goes_on():
    policy = Scripted()
    episode = Episode(policy)
    episode.answer(observe("pick"))
    episode.answer(observe())
    assert policy.calls == ["pick", "act", "act"]


def test_an_episode_begins_with_a_prompt():
    policy = Scripted()
    with pytest.raises(RequestError, match="no 'prompt'"):
        Episode(policy).answer(observe())
    assert policy.calls == []


def test_a_reset_with_an_observation_resets_first():
    policy = Scripted()
    episode = Episode(policy)
    episode.answer(observe("pick"))
    episode.answer(observe(reset=True))
    assert policy.calls == ["pick", "act", "pick", "act"]


def test_a_reset_alone_resets_at_once_and_only_once():
    policy = Scripted()
    episode = Episode(policy)
    assert episode.answer(Request(None, "pick", reset=True)) == {"reset": True}
    episode.answer(observe("pick"))
    assert policy.calls == ["pick", "act"]


def test_a_reset_before_the_first_prompt_waits_for_it():
    policy = Scripted()
    episode = Episode(policy)
    assert episode.answer(Request(None, reset=True)) == {"reset": True}
    episode.answer(observe("pick"))
    assert policy.calls == ["pick", "act"]


@pytest.mark.parametrize("failure", [RuntimeError("broken"), np.full(7, np.nan)])
def test_after_a_failure_a_new_episode_begins(failure):
    policy = Scripted(failure)
    episode = Episode(policy)
    with pytest.raises((RuntimeError, PolicyError)):
        episode.answer(observe("pick"))
    episode.answer(observe("pick"))
    assert policy.calls == ["pick", "act", "pick", "act"]


def test_the_reply_carries_timing_in_milliseconds_and_flags():
    step = ActionStep(np.full(7, 0.5), timing={"vision": 0.002}, flags={"kept": 64})
    reply = Episode(Scripted(step)).answer(observe("pick"))
    np.testing.assert_array_equal(reply.pop("actions"), np.full((1, 7), 0.5, np.float32))
    assert reply == {"policy_timing": {"vision_ms": 2.0}, "flags": {"kept": 64}}


def test_a_chunk_stays_a_chunk():
    chunk = np.linspace(-1, 1, 21).reshape(3, 7)
    np.testing.assert_array_equal(check_actions(chunk), chunk.astype(np.float32))


@pytest.mark.parametrize("actions", [np.zeros(6), np.zeros((2, 6)), np.zeros((0, 7)), np.zeros((1, 1, 7)), 0.0])
def test_anything_but_actions_is_refused(actions):
    with pytest.raises(PolicyError, match="shape"):
        check_actions(actions)


def test_one_wrong_action_of_a_chunk_is_refused():
    with pytest.raises(PolicyError, match=r"action\[6\] is 2.0"):
        check_actions(np.array([[0] * 7, [0] * 6 + [2]]))


def test_build_warms_up():
    class Warm(HoldPolicy):
        warm = False

        def warm_up(self):
            self.warm = True

    assert build(Warm).warm


def test_build_refuses_what_is_no_policy():
    with pytest.raises(PolicyError, match="lacks reset, act or action_spec"):
        build(object)


@pytest.fixture
def policy_thread():
    thread = PolicyThread()
    yield thread
    assert thread.end(10)


def test_jobs_run_in_order_in_one_thread(policy_thread):
    order = []
    jobs = [policy_thread.submit(lambda i=i: order.append((i, threading.get_ident()))) for i in range(20)]
    assert all(job.result(10).error is None for job in jobs)
    assert [i for i, _ in order] == list(range(20))
    assert len({ident for _, ident in order}) == 1


@pytest.mark.parametrize("error", [ValueError("x"), StopIteration(), SystemExit(3), KeyboardInterrupt()])
def test_an_error_is_an_outcome_and_the_thread_lives(policy_thread, error):
    def fail():
        raise error

    assert policy_thread.submit(fail).result(10).error is error
    assert policy_thread.submit(lambda: 1).result(10).value == 1


def test_a_job_cancelled_in_time_is_skipped_and_busy_is_told(policy_thread):
    begun, go_on, ran = threading.Event(), threading.Event(), []
    assert policy_thread.busy_for == 0
    first = policy_thread.submit(lambda: (begun.set(), go_on.wait(10)))
    second = policy_thread.submit(lambda: ran.append(2))
    assert begun.wait(10)
    assert policy_thread.busy_for > 0
    assert second.cancel()
    go_on.set()
    assert first.result(10).error is None
    assert policy_thread.submit(lambda: len(ran)).result(10).value == 0


def test_a_thread_that_is_busy_does_not_hold_up_the_end():
    go_on = threading.Event()
    thread = PolicyThread()
    thread.submit(lambda: go_on.wait(10))
    assert not thread.end(0.01)
    go_on.set()
    assert thread.end(10)
