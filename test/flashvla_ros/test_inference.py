"""The policy's thread: what is asked of it happens between two observations, or not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from flashvla_ros.errors import MessageError
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
    made = Inference(policy, lambda work: work(), lambda error: None, lambda pause: None, 1.0)
    yield made
    made.end(10)


def started(inference: Inference) -> None:
    inference.activate()
    inference.reset("go")
    assert inference.wait_until_reset(10)


def answer(inference: Inference, work: Callable[[], object], stamp_ns: int) -> None:
    """Offers an observation and waits until the thread is through with it."""
    inference.offer(work, stamp_ns)
    inference.ask(lambda: None, 10)
    inference.ask(lambda: None, 10)  # the first may come before the answer of the same round


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

    inference.offer(work, 0)
    assert busy.wait(10)
    with pytest.raises(TimeoutError, match="the policy has been busy"):
        inference.ask(lambda: policy.note("too late"), 0.01)
    go_on.set()
    inference.offer(done.set, 1)
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
        inference.offer(observe, 0)
        assert done.acquire(timeout=10)
    assert policy.heard == ["go", "act", "clear", "act", "act"]


def test_each_activation_begins_an_episode(policy, inference):
    inference.activate()  # nothing to begin without an instruction
    inference.reset("go")
    for _ in range(2):
        assert inference.wait_until_reset(10)
        answer(inference, lambda: policy.note("act"), 0)
        inference.deactivate(lambda: None)
        inference.activate()
    assert inference.wait_until_reset(10)
    assert policy.heard == ["go", "act", "go", "act", "go"]


def test_after_a_pause_and_where_stamps_go_back_an_episode_begins(policy):
    begun: list[str] = []
    inference = Inference(policy, lambda work: work(), lambda error: None, begun.append, 1.0)
    try:
        started(inference)
        for stamp in (5.0, 6.0, 7.1, 7.2, 3.0, 4.0):
            answer(inference, lambda stamp=stamp: policy.note(str(stamp)), int(stamp * 1e9))
    finally:
        inference.end(10)
    assert policy.heard == ["go", "5.0", "6.0", "go", "7.1", "7.2", "go", "3.0", "4.0"]
    said = ["", "no observation was answered for 1.100 s, limit 1.0 s"]
    assert begun == [*said, "the stamps of the observations went back by 4.200 s"]


def test_an_observation_that_is_refused_does_not_end_a_pause(policy, inference):
    def refuse() -> None:
        raise MessageError("no image")

    started(inference)
    for number, stamp in enumerate((0.0, 0.9, 1.8)):
        answer(inference, refuse if number == 1 else lambda: policy.note("act"), int(stamp * 1e9))
    assert policy.heard == ["go", "act", "go", "act"]


class InFlight:
    """A step that the policy is in until `end` is called; published: what it commanded after that."""

    def __init__(self, inference: Inference, error: Exception | None = None) -> None:
        self.published: list[str] = []
        self._inference, self._error = inference, error
        self._begun, self._go_on = threading.Event(), threading.Event()
        inference.offer(self._work, 0)
        assert self._begun.wait(10)

    def _work(self) -> None:
        self._begun.set()
        assert self._go_on.wait(10)
        if self._error:
            raise self._error
        self._inference.while_valid(lambda: self.published.append("command"))

    def end(self) -> None:
        self._go_on.set()
        self._inference.ask(lambda: None, 10)


def again(inference: Inference) -> None:
    inference.deactivate(lambda: None)
    inference.activate()


@pytest.mark.parametrize("interrupt", [lambda i: i.reset("go"), lambda i: i.reset("stop"), again])
def test_a_step_in_flight_commands_nothing_after_a_reset_an_instruction_or_an_activation(inference, interrupt):
    started(inference)
    step = InFlight(inference)
    interrupt(inference)
    step.end()
    assert inference.wait_until_reset(10)
    assert not step.published
    step = InFlight(inference)
    step.end()
    assert step.published == ["command"]


@pytest.mark.parametrize("interrupt", [lambda i: i.reset("go"), again])
def test_an_error_of_a_step_in_flight_is_none_of_the_episode_that_began_meanwhile(policy, inference, interrupt):
    started(inference)
    step = InFlight(inference, RuntimeError("of the last episode"))
    interrupt(inference)
    step.end()
    assert inference.wait_until_reset(10)
    assert not inference.fault
    answer(inference, lambda: policy.note("act"), 0)
    assert policy.heard == ["go", "go", "act"]
    InFlight(inference, RuntimeError("of this one")).end()
    assert inference.fault == "policy failed: RuntimeError: of this one"


def test_who_watches_is_told_of_each_reset_after_the_policy_and_in_its_thread(policy):
    inference = Inference(
        policy, lambda work: work(), lambda error: None, lambda pause: policy.note(f"watched{pause}"), 1.0
    )
    try:
        started(inference)
        inference.reset("go")
        assert inference.wait_until_reset(10)
    finally:
        inference.end(10)
    assert policy.heard == ["go", "watched", "go", "watched"]
    assert len(policy.threads) == 1
