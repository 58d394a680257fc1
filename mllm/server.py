"""`flashvla serve`: a policy over a websocket, in the protocol of `openpi-client`, so that its users need no change.

The server's metadata come first, then one message a direction and step: see `mllm.server_conversation`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import http
import logging
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response as HttpResponse

from mllm.policy import Policy
from mllm.server_config import ServerConfig
from mllm.server_conversation import Conversation, close
from mllm.server_episode import Episode, Outcome, PolicyThread, build
from mllm.wire import pack

_CLOSE_LIMIT = 5.0  # s that the end waits for clients to leave, a step under way included
_END_LIMIT = 1.0  # s more for the policy's thread
_HANDSHAKE_LIMIT = 2.0  # s for a client to answer a close
_log = logging.getLogger(__name__)


class PolicyServer:
    """Serves a policy until it is told to end: `run()` in the main thread, or `with PolicyServer(...)` beside others.

    factory: makes a policy. One is made before anybody can connect, so that its errors show at once; each connection
    has one to itself, so that episodes do not mix, and leaves it to the next. A further one is made when more clients
    are connected than ever before, while the others wait: where that is slow or memory is short, let the policies of
    the factory share their weights, or lower `max_connections`. All are made and called in one thread.
    name: what the metadata call the policy.
    """

    def __init__(self, factory: Callable[[], Policy], config: ServerConfig | None = None, name: str = "policy") -> None:
        self.config = config or ServerConfig()
        self._factory, self._name = factory, name
        self._metadata = b""
        self._idle: list[Policy] = []
        self._connected = 0
        self._policies: PolicyThread
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._thread: threading.Thread | None = None
        self.port = self.config.port
        """The port listened on, once serving."""

    def run(self) -> None:
        """Serves until SIGTERM or SIGINT. Raises OSError: the port is taken. Whatever the factory raises."""
        asyncio.run(self._serve(Future(), signals=(signal.SIGTERM, signal.SIGINT)))

    def __enter__(self) -> PolicyServer:
        """Serves in a thread of its own from now on. Raises as `run` does."""
        started: Future[None] = Future()

        def serve_in_thread() -> None:
            try:
                asyncio.run(self._serve(started))
            except BaseException as error:
                if started.done():
                    raise
                started.set_exception(error)

        self._thread = threading.Thread(target=serve_in_thread, name="policy server")
        self._thread.start()
        try:
            started.result()
        except BaseException:
            self._thread.join()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._thread is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    # ------------------------------------------------------------------ life of the server

    async def _serve(self, started: Future[None], signals: tuple[signal.Signals, ...] = ()) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        for number in signals:
            self._loop.add_signal_handler(number, self._stop.set)
        self._policies = PolicyThread()
        try:
            if not await self._make_first():
                return
            server = await self._listen()
            _log.info("serving '%s' at ws://%s:%d", self._name, self.config.host, self.port)
            started.set_result(None)
            await self._stop.wait()
            await self._hang_up(server)
        finally:
            if not self._policies.end(_END_LIMIT):
                _log.warning("the policy was still busy at the end, and is left alone")

    async def _hang_up(self, server: Server) -> None:
        server.close()
        try:
            await asyncio.wait_for(server.wait_closed(), _CLOSE_LIMIT)
        except asyncio.TimeoutError:
            _log.warning("some clients were still there %g s after the end was announced", _CLOSE_LIMIT)

    async def _make_first(self) -> bool:
        """Makes the first policy, and the metadata with it; False where the end comes first."""
        made = asyncio.wrap_future(self._policies.submit(lambda: build(self._factory)))
        stopped = asyncio.ensure_future(self._stop.wait())
        either: set[asyncio.Future[Any]] = {made, stopped}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not made.done():
            made.cancel()
            return False
        policy = _value(made.result())
        self._idle.append(policy)
        self._metadata = pack(
            {"policy": self._name, "action_spec": dataclasses.asdict(policy.action_spec), "versions": _versions()}
        )
        return True

    async def _listen(self) -> Server:
        config = self.config
        server = await serve(
            self._converse,
            config.address,
            config.port,
            process_request=self._admit,
            origins=[None],  # a browser names an origin: no web page may reach a robot through its visitor
            compression=None,  # and so no message grows on arrival
            max_size=config.max_message_bytes,
            max_queue=1,
            ping_interval=config.ping_timeout,
            ping_timeout=config.ping_timeout,
            close_timeout=_HANDSHAKE_LIMIT,
            server_header=None,
        )
        self.port = next(iter(server.sockets)).getsockname()[1]
        return server

    # ------------------------------------------------------------------ one connection

    def _admit(self, connection: ServerConnection, request: HttpRequest) -> HttpResponse | None:
        """Answers the health check, and turns away who lacks the token."""
        if request.path == "/healthz":
            if self._policies.busy_for > self.config.request_timeout:
                return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "the policy does not answer\n")
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if self.config.token is None:
            return None
        given = request.headers.get_all("Authorization")
        expected = f"Api-Key {self.config.token}".encode()
        if len(given) == 1 and hmac.compare_digest(given[0].encode(errors="surrogateescape"), expected):
            return None
        return connection.respond(http.HTTPStatus.UNAUTHORIZED, "send the token as 'Authorization: Api-Key TOKEN'\n")

    async def _converse(self, connection: ServerConnection) -> None:
        limit = self.config.max_connections
        if self._connected >= limit:
            await close(connection, CloseCode.TRY_AGAIN_LATER, f"all {limit} connections are in use; try again later")
            return
        self._connected += 1
        policy: Policy | None = None
        try:
            policy = await self._take_policy(connection)
            if policy is not None:
                await connection.send(self._metadata)
                await Conversation(connection, Episode(policy), self._policies, self.config).run()
        except ConnectionClosed as closed:
            _log.info("%s: %s", connection.remote_address, closed)
        finally:
            self._connected -= 1
            if policy is not None:
                self._idle.append(policy)

    async def _take_policy(self, connection: ServerConnection) -> Policy | None:
        if self._idle:
            return self._idle.pop()
        outcome = await asyncio.wrap_future(self._policies.submit(lambda: build(self._factory)))
        if outcome.error is None:
            return outcome.value
        _log.error("no further policy can be made", exc_info=outcome.error)
        await close(connection, CloseCode.INTERNAL_ERROR, "no further policy can be made; see the server's log")
        return None


def _value(outcome: Outcome) -> Any:
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


def _versions() -> dict[str, str]:
    """What made the actions; a package that is run from its sources is not listed."""
    versions = {"python": sys.version.split()[0]}
    for package in ("flashvla_ros", "torch", "numpy", "msgpack", "websockets"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
