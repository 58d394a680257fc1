"""Who gets in, what cannot be read, and how the server ends: over real sockets on the loopback interface."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import logging
import socket
import threading

import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from mllm.policy import HoldPolicy
from mllm.server import PolicyServer
from mllm.server_config import ServerConfig
from mllm.wire import pack, unpack

# openpi-client connects in a way that newer versions of websockets deprecate.
pytestmark = pytest.mark.filterwarnings("ignore:connect:DeprecationWarning")

TASK = {"images": {"front": np.zeros((32, 48, 3), np.uint8)}, "prompt": "pick"}


class Hanging(HoldPolicy):
    """Answers once `go_on` is set."""

    def __init__(self):
        self.begun, self.go_on = threading.Event(), threading.Event()

    def act(self, observation):
        self.begun.set()
        assert self.go_on.wait(60)
        return super().act(observation)


def raw(server, **options):
    return connect(f"ws://127.0.0.1:{server.port}", compression=None, max_size=None, **options)


def get(server, path):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", path)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


# ---------------------------------------------------------------- who gets in


def test_the_health_check_needs_no_websocket_and_no_token(serve):
    assert get(serve(token="secret"), "/healthz") == (200, "OK\n")


def test_the_token_opens(serve):
    client = WebsocketClientPolicy("127.0.0.1", serve(token="secret").port, api_key="secret")
    assert client.infer(TASK)["actions"].shape == (1, 7)
    client._ws.close()


@pytest.mark.parametrize("key", [None, "", "Secret", "secret2"])
def test_no_other_token_opens(serve, key):
    server = serve(token="secret")
    with pytest.raises(InvalidStatus, match="401"):
        WebsocketClientPolicy("127.0.0.1", server.port, api_key=key)


@pytest.mark.parametrize(
    "headers",
    [[("Authorization", "Bearer secret")], [("Authorization", "Api-Key secret"), ("Authorization", "Api-Key x")]],
)
def test_the_token_comes_once_and_as_openpi_client_sends_it(serve, headers):
    with pytest.raises(InvalidStatus, match="401"):
        raw(serve(token="secret"), additional_headers=headers)


def test_a_web_page_does_not_get_in(serve):
    with pytest.raises(InvalidStatus, match="403"):
        raw(serve(), origin="https://example.com")


def test_one_client_too_many_is_told_so(serve):
    server = serve(max_connections=1)
    with raw(server) as first:
        first.recv()
        with raw(server) as second, pytest.raises(ConnectionClosed, match=r"1013.*all 1 connections are in use"):
            second.recv()


def test_a_client_that_does_not_answer_pings_is_dropped(serve):
    server = serve(ping_timeout=0.1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as peer:
        lines = ("GET / HTTP/1.1", "Host: x", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
        key = "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg=="
        peer.sendall("\r\n".join((*lines, key, "", "")).encode())
        received = b"".join(iter(lambda: peer.recv(4096), b""))
    assert b"keepalive ping timeout" in received


# ---------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize(
    ("frame", "code", "reason"),
    [
        ("text", 1003, "send msgpack in a binary message"),
        (b"", 1007, "not msgpack"),
        (b"\xc1" * 100, 1007, "not msgpack"),
        (pack(TASK)[:-1], 1007, "not msgpack"),
        (b"\x91" * 100_000, 1007, "not msgpack"),
        (pack([1]), 1008, "send a map"),
        (pack({"images": {"front": np.zeros((600, 600, 3), np.uint8)}}), 1009, ""),
    ],
    ids=["text", "empty", "garbage", "cut", "deep", "no map", "too long"],
)
def test_a_frame_that_cannot_be_read_closes_with_a_reason(serve, frame, code, reason):
    server = serve(max_message_bytes=2**20)
    with raw(server) as client:
        client.recv()
        client.send(frame)
        with pytest.raises(ConnectionClosed) as closed:
            client.recv()
    assert closed.value.rcvd.code == code
    assert reason in closed.value.rcvd.reason
    with raw(server) as client:
        assert unpack(client.recv())["policy"] == "test"


def test_a_message_in_parts_is_put_together_but_not_for_ever(serve):
    message = pack(TASK)
    with raw(serve()) as client:
        client.recv()
        client.send([message[:100], message[100:200], message[200:]])
        assert unpack(client.recv())["actions"].shape == (1, 7)
        with pytest.raises(ConnectionClosed, match=r"1007.*more than 1024 fragments"):
            client.send(itertools.repeat(b""))  # until the server closes


def test_a_compressed_message_cannot_grow_on_arrival(serve):
    with connect(f"ws://127.0.0.1:{serve().port}", compression="deflate") as client:
        assert client.protocol.extensions == []


def test_what_is_no_http_leaves_the_server_alone(serve, caplog):
    caplog.set_level(logging.CRITICAL, "websockets.server")
    server = serve()
    for garbage in (b"\0" * 1000, b"GET /" + b"x" * 100_000, b"POST / HTTP/1.1\r\n\r\n", b""):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as peer:
            peer.sendall(garbage)
    assert get(server, "/healthz") == (200, "OK\n")


def test_a_policy_that_hangs_costs_its_client_the_connection_and_shows_in_the_health_check(serve):
    policy = Hanging()
    server = serve(lambda: policy, request_timeout=0.2)
    try:
        with raw(server) as client:
            client.recv()
            client.send(pack(TASK))
            assert client.recv() == "the policy did not answer within 0.2 s"
            with pytest.raises(ConnectionClosed, match="1011"):
                client.recv()
        while get(server, "/healthz") != (503, "the policy does not answer\n"):
            assert policy.begun.is_set()
    finally:
        policy.go_on.set()
    while get(server, "/healthz") != (200, "OK\n"):
        continue


def test_a_port_that_is_taken_is_an_error(serve):
    taken = serve().port
    with pytest.raises(OSError, match="address already in use"), PolicyServer(HoldPolicy, ServerConfig(port=taken)):
        pytest.fail("it serves")


def test_the_end_tells_the_clients_and_leaves_no_thread():
    contacts = contextlib.ExitStack()
    with PolicyServer(HoldPolicy, ServerConfig(port=0)) as server:
        client = contacts.enter_context(raw(server))
        client.recv()
    with pytest.raises(ConnectionClosed) as closed:
        client.recv()
    assert closed.value.rcvd.code == 1001
    contacts.close()
    assert not {"policy server", "policies"} & {thread.name for thread in threading.enumerate()}
