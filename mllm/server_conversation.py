"""One client's conversation with the policy server.

One binary msgpack message a direction and step (see `mllm.wire` and `mllm.server_request`). An error of a step is a
text message, and the conversation goes on. A message that cannot be read closes the connection with a reason: 1003 for
text, 1007 for what is not msgpack within the limits, 1008 for what is not a map, 1009 for size.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from concurrent.futures import Future
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.frames import CloseCode

from mllm.errors import PolicyError
from mllm.server_config import ServerConfig
from mllm.server_episode import Episode, Outcome, PolicyThread
from mllm.server_request import RequestError, read_request
from mllm.wire import WireError, pack, unpack

_MAX_FRAGMENTS = 1024  # of one message; clients send it whole, and empty ones would count nothing towards its size
_MAX_REASON = 123  # bytes; a close frame holds no more
_log = logging.getLogger(__name__)


class Conversation:
    """Answers a client's messages from its own episode, one after the other."""

    def __init__(
        self, connection: ServerConnection, episode: Episode, policies: PolicyThread, config: ServerConfig
    ) -> None:
        self._connection, self._episode, self._policies, self._config = connection, episode, policies, config
        self._previous_ms: float | None = None

    async def run(self) -> None:
        """Answers until the client leaves (ConnectionClosed), or closes where it cannot go on (returns)."""
        while True:
            try:
                frame = await _receive(self._connection)
                begin = time.perf_counter()
                message = None if isinstance(frame, str) else unpack(frame)
            except WireError as error:
                await close(self._connection, CloseCode.INVALID_DATA, str(error))
                return
            if isinstance(frame, str):
                await close(self._connection, CloseCode.UNSUPPORTED_DATA, "text: send msgpack in a binary message")
                return
            if not isinstance(message, dict):
                await close(self._connection, CloseCode.POLICY_VIOLATION, f"a {type(message).__name__}: send a map")
                return
            reply = await self._answer(message)
            if reply is None:
                await self._connection.send(f"the policy did not answer within {self._config.request_timeout:g} s")
                await close(self._connection, CloseCode.INTERNAL_ERROR, "the policy did not answer in time")
                return
            await self._connection.send(reply)
            self._previous_ms = (time.perf_counter() - begin) * 1e3

    async def _answer(self, message: dict[Any, Any]) -> bytes | str | None:
        """The reply to a message: packed, an error as text, or None where the policy takes too long."""
        try:
            request = read_request(message)
        except RequestError as error:
            return str(error)

        def step() -> bytes:
            begin = time.perf_counter()
            reply = self._episode.answer(request)
            timing = {"infer_ms": (time.perf_counter() - begin) * 1e3}
            if self._previous_ms is not None:
                timing["prev_total_ms"] = self._previous_ms
            return pack({**reply, "server_timing": timing})

        job = self._policies.submit(step)
        answer = asyncio.wrap_future(job)
        done, _ = await asyncio.wait({answer}, timeout=self._config.request_timeout)
        if not done:
            answer.cancel()
            job.add_done_callback(_log_late)
            _log.error("the policy did not answer within %g s", self._config.request_timeout)
            return None
        outcome = answer.result()
        return outcome.value if outcome.error is None else self._describe(outcome.error)

    def _describe(self, error: BaseException) -> str:
        """What a client is told of a failed step; our log has it all."""
        if isinstance(error, RequestError):
            return str(error)
        _log.error("the policy failed", exc_info=error)
        if self._config.debug:
            return "".join(traceback.format_exception(error))
        known = isinstance(error, PolicyError)  # its text is made to be read by users
        return f"the policy failed: {error if known else type(error).__name__ + '; see the log of the server'}"


async def close(connection: ServerConnection, code: CloseCode, reason: str) -> None:
    """Closes the connection, telling the client and the log why."""
    _log.warning("%s: closing with %d: %s", connection.remote_address, code, reason)
    await connection.close(code, reason.encode()[:_MAX_REASON].decode(errors="ignore"))


async def _receive(connection: ServerConnection) -> str | bytes:
    """The next message. Raises WireError: it comes in too many fragments."""
    fragments: list[Any] = []
    async for fragment in connection.recv_streaming():
        if len(fragments) == _MAX_FRAGMENTS:
            raise WireError(f"a message in more than {_MAX_FRAGMENTS} fragments: send it whole")
        fragments.append(fragment)
    return fragments[0][:0].join(fragments)


def _log_late(job: Future[Outcome]) -> None:
    """The error of a step that nobody waits for any more is still worth knowing."""
    if not job.cancelled() and job.result().error is not None:
        _log.error("the policy failed after its client was let go", exc_info=job.result().error)
