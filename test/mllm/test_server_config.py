"""Settings that would be unsafe, or cannot be meant, are refused by name."""

from __future__ import annotations

import pytest

from mllm.errors import PolicyError
from mllm.server_config import ServerConfig


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.1", "::"])
def test_other_machines_need_a_token(host):
    with pytest.raises(PolicyError, match=f"host is '{host}'.*no token is set"):
        ServerConfig(host=host)
    ServerConfig(host=host, token="secret")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("host", "example.com"),
        ("port", -1),
        ("port", 65_536),
        ("max_message_bytes", 0),
        ("max_connections", 0),
        ("ping_timeout", 0.0),
        ("request_timeout", float("inf")),
        ("token", ""),
        ("token", "two words"),
        ("token", "schlüssel"),
    ],
)
def test_a_wrong_setting_is_named(field, value):
    with pytest.raises(PolicyError, match=f"^{field} is "):
        ServerConfig(**{field: value})


def test_the_token_is_not_shown():
    assert "secret" not in repr(ServerConfig(token="secret"))
