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
    on_reset: called after each reset of the policy, with why where nobody asked for it.
    max_pause: s between the stamps of two observations answered; after a longer one, and where stamps go back, the
    policy is reset: what it had planned before says nothing any more.
    """

    def __init__(
        self,
        policy: Policy,
        answer: Callable[[Any], None],
        on_error: Callable[[Exception], None],
        on_reset: Callable[[str], None],
        max_pause: float,
    ) -> None:
        self._policy, self._answer, self._on_error, self._on_reset = policy, answer, on_error, on_reset
        self._max_pause = max_pause
        self._changed = threading.Condition()
        self._work: tuple[Any, int] | None = None  # with its stamp, ns
        self._instruction: str | None = None
        self._reset_wanted = False
        self._answered_ns: int | None = None  # stamp of the newest observation answered since the last reset
        self._forget = False  # a command was not carried out as proposed
        self._asked: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._ready = False  # the policy was reset with an instruction
        self._generation = 0  # a step that began before the newest reset, activation or deactivation is void
        self._began_in = 0  # the generation of the step that the thread is in
        self._active = False
        self._ended = False
        self.fault = ""
        self.replaced = 0  # observations that a newer one replaced before they were looked at
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    @property
    def active(self) -> bool:
        return self._active

    def offer(self, work: Any, stamp_ns: int) -> None:
        """Puts the newest observation in the slot; ignored while not active."""
        with self._changed:
            if self._active:
                self.replaced += self._work is not None
                self._work = work, stamp_ns
                self._changed.notify_all()

    def reset(self, instruction: str) -> None:
        """Asks for a reset: it happens before any observation offered later is answered, and clears a fault."""
        with self._changed:
            self._generation += 1
            self._instruction, self._reset_wanted = instruction, True
            self._work, self._ready, self.fault = None, False, ""
            self._changed.notify_all()

    def wait_until_reset(self, limit: float) -> bool:
        """True when the reset asked for is done within `limit` s."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._reset_wanted, limit)

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
        """Observations offered once the policy has begun its episode anew are answered; see `wait_until_reset`."""
        with self._changed:
            self._active, self._work = True, None
            if self._instruction is not None:
                self.reset(self._instruction)

    def deactivate(self, last_word: Callable[[], None]) -> None:
        """Answers nothing any more. If it was active, `last_word` is the last thing published."""
        with self._changed:
            self._generation += 1
            was_active, self._active, self._work = self._active, False, None
            if was_active:
                last_word()

    def while_valid(self, publish: Callable[[], None]) -> bool:
        """For `answer`: calls `publish` unless deactivated or reset since the step began, so that nothing follows the
        last word and no command carries out an old instruction. Returns whether it did.
        """
        with self._changed:
            valid = self._active and self._began_in == self._generation
            if valid:
                publish()
            return valid

    def end(self, limit: float) -> None:
        """Ends the thread, waiting at most `limit` s for the step it is in."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join(limit)

    def _has_something_to_do(self) -> bool:
        answerable = self._ready and self._work is not None
        return self._ended or bool(self._asked) or self._reset_wanted or answerable

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_something_to_do)
                if self._ended:
                    return
                self._began_in = self._generation
                asked, self._asked = self._asked, deque()
                instruction, reset = self._instruction, self._reset_wanted
                work = self._work if self._ready else None
                if self._ready or reset:  # what came before a reset is not answered
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
                pause = self._pause_before(work[1]) if work is not None else ""
                if instruction is not None and (reset or pause):
                    self._policy.reset(instruction)
                    self._answered_ns = None
                    self._on_reset("" if reset else pause)
                if work is not None:
                    self._answer(work[0])
                    self._answered_ns = work[1]
            except MessageError as error:
                self._on_error(error)
            except Exception as error:  # a policy's error must stop the robot, not the node
                with self._changed:
                    if self._began_in == self._generation:
                        self._ready, self.fault = False, f"policy failed: {type(error).__name__}: {error}"
                self._on_error(error)
            if reset:
                with self._changed:
                    if self._began_in == self._generation:  # not asked again meanwhile
                        self._reset_wanted, self._ready = False, not self.fault
                    self._changed.notify_all()

    def _pause_before(self, stamp_ns: int) -> str:
        """What is wrong with the time since the observation answered last, empty if nothing is."""
        pause = 0.0 if self._answered_ns is None else (stamp_ns - self._answered_ns) * 1e-9
        if pause < 0:
            return f"the stamps of the observations went back by {-pause:.3f} s"
        if pause > self._max_pause:
            return f"no observation was answered for {pause:.3f} s, limit {self._max_pause} s"
        return ""
