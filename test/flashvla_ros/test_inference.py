"""The policy's thread: what is asked of it happens between two observations, or not at all."""

from __future__ import annotations

import threading

import pytest

from flashvla_ros.inference import Inference
from mllm.errors import PolicyError


class Told:
    """A policy that notes what it is told, and in which thread."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.threads: set[int] = set()

    def reset(self, instruction: str) -> None:
        self.note(instruction)

    def clear(self) -> None:
        self.note("clear")

    def note(self, what: str) -> str:
        self.heard.append(what)
        self.threads.add(threading.get_ident())
        return what


@pytest.fixture
def policy():
    return Told()


@pytest.fixture
def inference(policy):
    made = Inference(policy, lambda work: work(), lambda error: None)
    yield made
    made.end(10)


def started(inference: Inference) -> None:
    inference.activate()
    inference.reset("go")
    assert inference.wait_until_reset(10)


def test_a_job_is_done_in_the_policy_s_thread_and_its_result_or_error_comes_back(policy, inference):
    assert inference.ask(lambda: policy.note("asked"), 10) == "asked"  # also before there is an instruction
    started(inference)
    assert inference.ask(lambda: policy.note("again"), 10) == "again"
    assert len(policy.threads) == 1
    assert threading.get_ident() not in policy.threads

    def refuse() -> None:
        raise PolicyError("no")

    with pytest.raises(PolicyError, match="no"):
        inference.ask(refuse, 10)
    assert not inference.fault


def test_a_job_that_a_busy_policy_cannot_do_in_time_is_not_done_at_all(policy, inference):
    started(inference)
    busy, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        busy.set()
        assert go_on.wait(10)

    inference.offer(work)
    assert busy.wait(10)
    with pytest.raises(TimeoutError, match="the policy has been busy"):
        inference.ask(lambda: policy.note("too late"), 0.01)
    go_on.set()
    inference.offer(done.set)
    assert done.wait(10)
    assert "too late" not in policy.heard


def test_the_policy_is_told_to_forget_before_the_next_observation_and_once(policy, inference):
    started(inference)
    done = threading.Semaphore(0)

    def observe() -> None:
        policy.note("act")
        done.release()

    for forget in (False, True, False):
        if forget:
            inference.forget()
        inference.offer(observe)
        assert done.acquire(timeout=10)
    assert policy.heard == ["clear", "go", "act", "clear", "act", "act"]  # the first: it was not active before
    inference.deactivate(lambda: None)
    inference.activate()
    inference.offer(observe)
    assert done.acquire(timeout=10)
    assert policy.heard[-2:] == ["clear", "act"]


def test_who_watches_is_told_of_each_reset_after_the_policy_and_in_its_thread(policy):
    inference = Inference(policy, lambda work: work(), lambda error: None, lambda: policy.note("watched"))
    try:
        started(inference)
        started(inference)
    finally:
        inference.end(10)
    assert [what for what in policy.heard if what != "clear"] == ["go", "watched", "go", "watched"]
    assert len(policy.threads) == 1
