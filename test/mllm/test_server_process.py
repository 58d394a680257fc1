"""The server as a process of its own: many clients, hostile frames, memory, and SIGTERM."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from mllm.wire import pack

# openpi-client connects in a way that newer versions of websockets deprecate.
pytestmark = pytest.mark.filterwarnings("ignore:connect:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = 10
REQUESTS = int(os.environ.get("FLASHVLA_TEST_REQUESTS", "200"))  # a client
FRAMES = int(os.environ.get("FLASHVLA_TEST_FRAMES", "2000"))
GROWTH_LIMIT = 8 * 2**20  # bytes; leaking a hundredth of what 2,000 frames carry would be more

SERVER = """
import logging, sys
import numpy as np
from mllm.policy import ActionSpec, ActionStep
from mllm.server import PolicyServer
from mllm.server_config import ServerConfig

class Counter:
    "Answers with the brightness that it sees and the number of the step in its episode."
    action_spec = ActionSpec()
    def reset(self, instruction):
        if instruction == "hang":
            sys.stdout.write("hanging\\n")
            sys.stdout.flush()
            while True:
                pass
        self.steps = 0
    def act(self, observation):
        self.steps += 1
        brightness = observation.images["front"][0, 0, 0] / 255
        return ActionStep(np.array([brightness, self.steps % 100 / 100, 0, 0, 0, 0, 0], np.float32))

class Announce(logging.Handler):
    def emit(self, record):
        if record.args and record.levelno == logging.INFO and "serving" in record.msg:
            sys.stdout.write(f"{record.args[-1]}\\n")
            sys.stdout.flush()

logging.getLogger("mllm.server").addHandler(Announce())
logging.getLogger("mllm.server").setLevel(logging.INFO)
PolicyServer(Counter, ServerConfig(port=0, max_message_bytes=2**20)).run()
"""


class Process:
    def __init__(self):
        self.popen = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.port = int(self.popen.stdout.readline())

    def connect(self):
        return connect(f"ws://127.0.0.1:{self.port}", compression=None, max_size=None)

    def resident(self):
        """Bytes of memory in use."""
        return int(Path(f"/proc/{self.popen.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def server():
    process = Process()
    yield process
    process.popen.kill()
    process.popen.wait()
    process.popen.stdout.close()


def observation(brightness):
    return {"images": {"front": np.full((128, 128, 3), brightness, np.uint8)}, "prompt": "pick"}


def test_ten_clients_at_once_get_every_answer_of_their_own_episode(server):
    def converse(number):
        client = WebsocketClientPolicy("127.0.0.1", server.port)
        message = observation(number)
        actions = [client.infer(message)["actions"] for _ in range(REQUESTS)]
        client._ws.close()
        return np.concatenate(actions)

    with ThreadPoolExecutor(CLIENTS) as threads:
        answers = list(threads.map(converse, range(CLIENTS)))
    for number, actions in enumerate(answers):
        np.testing.assert_array_equal(actions[:, 0], np.full(REQUESTS, np.float32(number / 255)))
        steps = np.arange(1, REQUESTS + 1) % 100 / 100
        np.testing.assert_array_equal(actions[:, 1], steps.astype(np.float32))


def hostile_frames(count):
    """Frames that a fuzzer would send: noise, damaged messages, false claims of length, arrays that are none."""
    rng = random.Random(0)
    valid = [
        pack(observation(1)),
        pack({"reset": True, "prompt": "pick"}),
        pack({"images": {"a": np.zeros((2, 2, 3), np.uint8)}, "proprio": {"q": np.zeros(7), "g": [0.0, 1]}}),
        pack({"observation/image": np.zeros((2, 2, 3), np.uint8), "observation/state": np.zeros(8), "prompt": "x"}),
    ]

    def damaged():
        frame = bytearray(rng.choice(valid))
        for _ in range(rng.randint(1, 8)):
            # Most of a message is pixels; what matters stands in its first and last bytes.
            position = rng.choice([rng.randrange(len(frame)), rng.randrange(min(80, len(frame)))])
            frame[position] = rng.randrange(256)
        return bytes(frame)

    def false_array():
        dtype = rng.choice(["|O", "<f4", "|V9", "<U3", "|b1", ">i8", "x" * 1000, None, 3, b"<f4"])
        shape = rng.choice([[2**62, 4], [-1], [0, 2**40], [1] * 40, "x", [[1]], [3], []])
        array = {b"__ndarray__": True, b"data": rng.randbytes(rng.randint(0, 16)), b"dtype": dtype, b"shape": shape}
        return msgpack.packb({"images": {"front": array}, "prompt": "pick"})

    kinds = [
        lambda: rng.randbytes(rng.randint(0, 300)),
        damaged,
        damaged,
        damaged,
        false_array,
        lambda: (frame := rng.choice(valid))[: rng.randrange(len(frame))],
        lambda: bytes([rng.choice([0xC6, 0xC9, 0xDB, 0xDD, 0xDF])]) + rng.randbytes(4) + rng.randbytes(50),
        lambda: rng.choice([b"\x91", b"\x81\xa1k", b"\xdc\x03\xff"]) * rng.randint(1, 20_000),
        lambda: b"\xdc\x04\x00" + (b"\xdc\x04\x00" + b"\x80" * 1024) * rng.randint(1, 200),
        lambda: rng.randbytes(100).decode("latin-1"),
        lambda: msgpack.packb(rng.choice([None, rng.random(), [rng.random()], "reset"])),
        lambda: msgpack.packb({rng.randbytes(8).hex(): rng.random() for _ in range(rng.randint(0, 200))}),
        lambda: bytes(2**20 + 1) if rng.random() < 0.1 else b"",
    ]
    return (rng.choice(kinds)() for _ in range(count))


def test_hostile_frames_are_answered_or_close_with_a_reason_and_memory_stays(server):
    client, before, codes = None, 0, set()
    for number, frame in enumerate(hostile_frames(FRAMES)):
        if number == FRAMES // 4:  # by now every buffer that is kept has been filled
            before = server.resident()
        if client is None:
            client = server.connect()
            client.recv()
        try:
            client.send(frame)
            client.recv()
        except ConnectionClosed as closed:
            codes.add(closed.rcvd and closed.rcvd.code)
            client.close()
            client = None
    if client is not None:
        client.close()
    assert codes == {1003, 1007, 1008, 1009}
    assert server.resident() - before < GROWTH_LIMIT
    assert server.popen.poll() is None
    last = WebsocketClientPolicy("127.0.0.1", server.port)
    assert last.infer(observation(255))["actions"][0, 0] == 1
    last._ws.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_status_0_and_tells_its_clients(server, number):
    with server.connect() as client:
        client.recv()
        server.popen.send_signal(number)
        with pytest.raises(ConnectionClosed, match="1001"):
            client.recv()
        assert server.popen.wait(timeout=20) == 0


def test_a_policy_that_never_returns_does_not_keep_the_process_alive(server):
    with server.connect() as client:
        client.recv()
        client.send(pack({"reset": True, "prompt": "hang"}))
        assert server.popen.stdout.readline() == "hanging\n"
        server.popen.terminate()
        assert server.popen.wait(timeout=30) == 0
