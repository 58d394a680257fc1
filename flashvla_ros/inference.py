"""The thread that owns a policy. It works on the newest observation only; there is no queue. No ROS in here."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from flashvla_ros.errors import MessageError
from mllm.policy import Policy


class Inference:
    """Calls `policy.reset` and `answer(work)`, both from one thread, while active and told an instruction.

    answer: turns one piece of work (the newest offered) into a published command.
    on_error: called with what went wrong. After an error of the policy nothing is answered until the next reset; after
    a MessageError only that observation is lost.
    on_reset: called after each reset of the policy.
    """

    def __init__(
        self,
        policy: Policy,
        answer: Callable[[Any], None],
        on_error: Callable[[Exception], None],
        on_reset: Callable[[], None] = lambda: None,
    ) -> None:
        self._policy, self._answer, self._on_error, self._on_reset = policy, answer, on_error, on_reset
        self._changed = threading.Condition()
        self._work: Any = None
        self._reset_to: str | None = None
        self._forget = False  # a command was not carried out as proposed
        self._asked: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._ready = False  # the policy was reset with an instruction
        self._active = False
        self._ended = False
        self.fault = ""
        self.replaced = 0  # observations that a newer one replaced before they were looked at
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    @property
    def active(self) -> bool:
        return self._active

    def offer(self, work: Any) -> None:
        """Puts the newest observation in the slot; ignored while not active."""
        with self._changed:
            if self._active:
                self.replaced += self._work is not None
                self._work = work
                self._changed.notify_all()

    def reset(self, instruction: str) -> None:
        """Asks for a reset: it happens before any observation offered later is answered, and clears a fault."""
        with self._changed:
            self._reset_to, self._work, self._ready, self.fault = instruction, None, False, ""
            self._changed.notify_all()

    def wait_until_reset(self, limit: float) -> bool:
        """True when the reset asked for is done within `limit` s."""
        with self._changed:
            return self._changed.wait_for(lambda: self._reset_to is None, limit)

    def ask(self, job: Callable[[], Any], limit: float) -> Any:
        """What `job` returns or raises, called by the thread before it answers the next observation.

        Raises TimeoutError: the policy was busy for `limit` s; then `job` is not called.
        """
        future: Future[Any] = Future()
        with self._changed:
            self._asked.append((job, future))
            self._changed.notify_all()
        try:
            return future.result(limit)
        except FutureTimeout:
            if future.cancel():
                raise TimeoutError(f"the policy has been busy for more than {limit} s") from None
            return future.result()

    def forget(self) -> None:
        """Before it answers the next observation the policy is told that a command was not carried out as proposed."""
        with self._changed:
            self._forget = True

    def activate(self) -> None:
        """Observations offered from now on are answered; what came before says nothing about them."""
        with self._changed:
            self._active, self._work, self._forget = True, None, True

    def deactivate(self, last_word: Callable[[], None]) -> None:
        """Answers nothing any more. If it was active, `last_word` is the last thing published."""
        with self._changed:
            was_active, self._active, self._work = self._active, False, None
            if was_active:
                last_word()

    def while_active(self, publish: Callable[[], None]) -> bool:
        """Calls `publish` unless deactivated meanwhile, so that nothing follows the last word."""
        with self._changed:
            if self._active:
                publish()
            return self._active

    def end(self, limit: float) -> None:
        """Ends the thread, waiting at most `limit` s for the step it is in."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join(limit)

    def _has_something_to_do(self) -> bool:
        answerable = self._ready and self._work is not None
        return self._ended or bool(self._asked) or self._reset_to is not None or answerable

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_something_to_do)
                if self._ended:
                    return
                asked, self._asked = self._asked, deque()
                instruction, work = self._reset_to, self._work if self._ready else None
                if self._ready or instruction is not None:  # what came before a reset is not answered
                    self._work = None
                forget, self._forget = self._forget, False
            for job, future in asked:
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(job())
                    except Exception as error:  # whoever asked gets it
                        future.set_exception(error)
            try:
                if forget and (clear := getattr(self._policy, "clear", None)):
                    clear()
                if instruction is not None:
                    self._policy.reset(instruction)
                    self._on_reset()
                elif work is not None:
                    self._answer(work)
            except MessageError as error:
                self._on_error(error)
            except Exception as error:  # a policy's error must stop the robot, not the node
                with self._changed:
                    self._ready, self.fault = False, f"policy failed: {type(error).__name__}: {error}"
                self._on_error(error)
            if instruction is not None:
                with self._changed:
                    if self._reset_to is instruction:  # not asked again meanwhile
                        self._reset_to, self._ready = None, not self.fault
                    self._changed.notify_all()
