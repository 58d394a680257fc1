"""What the tests of mllm share: torch set up where a test uses it (the others run without), and servers that end."""

from __future__ import annotations

import sys

import pytest

from mllm.policy import HoldPolicy
from mllm.server import PolicyServer
from mllm.server_config import ServerConfig


@pytest.fixture(autouse=True)
def _two_threads_and_a_seed():
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(2)
        torch.manual_seed(0)


@pytest.fixture
def serve():
    """Starts servers that end with the test: serve(factory, **fields of ServerConfig)."""
    running = []

    def start(factory=HoldPolicy, name="test", **config):
        server = PolicyServer(factory, ServerConfig(port=0, **config), name=name).__enter__()
        running.append(server)
        return server

    yield start
    for server in running:
        server.__exit__(None, None, None)
