"""The thread that owns every policy of a server, and what one connection does with its own. No network in here."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from mllm.errors import PolicyError
from mllm.policy import Observation, Policy, check_action
from mllm.server_request import Request, RequestError


@dataclass(frozen=True)
class Outcome:
    """What a job came to: its value, or the error it raised."""

    value: Any = None
    error: BaseException | None = None


class PolicyThread:
    """Runs one job at a time, in the order asked for: policies are not thread safe, so all are made and called here.

    The thread is a daemon: a policy that never returns does not keep the process alive.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Outcome]] | None] = queue.SimpleQueue()
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="policies", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], Any]) -> Future[Outcome]:
        """Queues a job. An error is in the outcome, never raised by the future; a job cancelled in time is skipped."""
        future: Future[Outcome] = Future()
        self._jobs.put((job, future))
        return future

    @property
    def busy_for(self) -> float:
        """Seconds since the job under way began; 0 where there is none."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def end(self, limit: float) -> bool:
        """Ends the thread after the jobs queued; False where that takes longer than `limit` s."""
        self._jobs.put(None)
        self._thread.join(limit)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, future = item
            if not future.set_running_or_notify_cancel():
                continue
            self._busy_since = time.monotonic()
            try:
                outcome = Outcome(value=job())
            except BaseException as error:  # whatever a third party's policy raises, even SystemExit, the thread lives
                outcome = Outcome(error=error)
            self._busy_since = None
            future.set_result(outcome)


def build(factory: Callable[[], Policy]) -> Policy:
    """A policy, warmed up where it can be. Raises PolicyError: it lacks a part of the interface."""
    policy = factory()
    if not isinstance(policy, Policy):
        raise PolicyError(f"the factory made a {type(policy).__name__}, which lacks reset, act or action_spec")
    warm_up = getattr(policy, "warm_up", None)
    if warm_up is not None:
        warm_up()
    return policy


class Episode:
    """One connection's policy, and the episode that it is in."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._prompt: str | None = None
        self._running = False  # the policy was reset, and nothing has failed since

    def answer(self, request: Request) -> dict[str, Any]:
        """Does what is asked, and returns the reply's "actions" (K, 7) float32, "policy_timing" (ms a stage), "flags".

        The policy is reset on a request to, when the prompt is another, and after a failure. A reset alone is answered
        with {"reset": True}.
        Raises RequestError: no prompt yet. PolicyError: an action that is none. Whatever the policy raises.
        """
        if request.reset or request.prompt not in (None, self._prompt):
            self._running = False
        if request.prompt is not None:
            self._prompt = request.prompt
        if self._prompt is None:
            if request.observation is None:
                return {"reset": True}
            raise RequestError("the first observation has no 'prompt': send the task in words with it")
        running, self._running = self._running, False  # until all below went well
        if not running:
            self.policy.reset(self._prompt)
        reply = {"reset": True} if request.observation is None else self._act(request.observation)
        self._running = True
        return reply

    def _act(self, observation: Observation) -> dict[str, Any]:
        step = self.policy.act(observation)
        return {
            "actions": check_actions(step.action),
            "policy_timing": {f"{stage}_ms": float(seconds) * 1e3 for stage, seconds in step.timing.items()},
            "flags": dict(step.flags),
        }


def check_actions(actions: np.ndarray) -> np.ndarray:
    """One action (7,), or a chunk of them (K, 7), as (K, 7) float32. Raises PolicyError: see `check_action`."""
    rows = np.atleast_2d(np.asarray(actions))
    if rows.ndim != 2 or not len(rows):
        raise PolicyError(f"the actions have shape {np.shape(actions)}: it must be (7,) or, for a chunk, (K, 7)")
    return np.stack([check_action(row) for row in rows])
