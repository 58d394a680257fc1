"""Policies that many episodes share: their threads ask, the thread that owns the policies answers in batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from mllm.policy import ActionStep, BatchedPolicy, Observation, Policy


class Stopped(BaseException):
    """The evaluation ends: the episode that is told so has no outcome. Not an Exception, so that it is no error."""


@dataclass
class Request:
    """What an episode's thread waits for: its beginning (an instruction), or the policy's answer to an observation."""

    policy: BatchedPolicy
    episode: Any
    observation: Observation | None
    instruction: str = ""
    asked: float = field(default_factory=time.perf_counter)
    answer: Future[Any] = field(default_factory=Future)


def is_batched(policy: Policy | None) -> bool:
    """Whether `policy` answers several episodes in one call."""
    return callable(getattr(policy, "begin", None)) and callable(getattr(policy, "act_batch", None))


class SharedPolicy:
    """What one episode's thread takes for its policy. `post` brings a request to the thread that owns the policy.

    An answer's timing has "queue" added: seconds that the observation waited for the policy.
    """

    def __init__(self, policy: BatchedPolicy, post: Callable[[Request], None]) -> None:
        self.action_spec = policy.action_spec
        self._policy, self._post = policy, post
        self._episode: Any = None

    def reset(self, instruction: str) -> None:
        self._episode = self._ask(Request(self._policy, None, None, instruction))

    def act(self, observation: Observation) -> ActionStep:
        return self._ask(Request(self._policy, self._episode, observation))

    def _ask(self, request: Request) -> Any:
        self._post(request)
        return request.answer.result()


def answer(requests: Sequence[Request], max_batch: int) -> None:
    """Answers `requests`, at most `max_batch` in one call; what a policy raises goes to everybody in that call."""
    looking: dict[int, list[Request]] = {}
    for request in requests:
        if request.observation is None:
            _settle([request], lambda: [request.policy.begin(request.instruction)])  # noqa: B023, called at once
        else:
            looking.setdefault(id(request.policy), []).append(request)
    for asking in looking.values():
        for start in range(0, len(asking), max_batch):
            batch = asking[start : start + max_batch]
            _settle(batch, lambda: _act(batch))  # noqa: B023, called at once


def _act(batch: Sequence[Request]) -> list[ActionStep]:
    began = time.perf_counter()
    observations = [request.observation for request in batch if request.observation is not None]
    steps = batch[0].policy.act_batch([request.episode for request in batch], observations)
    return [
        replace(step, timing={**step.timing, "queue": began - request.asked}, flags={**step.flags, "batch": len(batch)})
        for request, step in zip(batch, steps, strict=True)
    ]


def _settle(batch: Sequence[Request], work: Callable[[], Sequence[Any]]) -> None:
    try:
        values = work()
    except Exception as error:  # each episode reports it as its own error, with this traceback
        for request in batch:
            request.answer.set_exception(error)
        return
    for request, value in zip(batch, values, strict=True):
        request.answer.set_result(value)
