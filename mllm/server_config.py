"""Where a policy is served, to whom, and within which limits."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field

from mllm.errors import PolicyError


@dataclass(frozen=True)
class ServerConfig:
    """Checked when made: PolicyError names the field, its value and the limit."""

    host: str = "127.0.0.1"
    """IP address to listen on, or localhost; one that others can reach needs a token."""
    port: int = 8000
    """0 takes a free one."""
    token: str | None = field(default=None, repr=False)
    """What clients must send as `Authorization: Api-Key TOKEN`; None lets everybody in."""
    max_message_bytes: int = 16 * 2**20
    """A larger message closes its connection."""
    max_connections: int = 16
    """Each holds a policy of its own."""
    ping_timeout: float = 20.0
    """s between pings, and s after which a client that does not answer one is dropped."""
    request_timeout: float = 30.0
    """s for a step, waiting for the other clients' steps included; then its connection is closed."""
    debug: bool = False
    """Send the policy's tracebacks to the client; they show the inside of the server."""

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65_535, "port", self.port, "from 0 to 65535")
        for name in ("max_message_bytes", "max_connections"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("ping_timeout", "request_timeout"):
            seconds = getattr(self, name)
            _require(math.isfinite(seconds) and seconds > 0, name, seconds, "a finite number of seconds above 0")
        if self.token is not None:
            printable = self.token.isascii() and self.token.isprintable() and " " not in self.token
            _require(bool(self.token) and printable, "token", "(not shown)", "printable ASCII without spaces")
        try:
            loopback = ipaddress.ip_address(self.address).is_loopback
        except ValueError:
            raise PolicyError(f"host is {self.host!r}: it must be an IP address, or localhost") from None
        rule = "a loopback address such as 127.0.0.1 where no token is set; set one to let other machines in"
        _require(loopback or self.token is not None, "host", self.host, rule)

    @property
    def address(self) -> str:
        """IP address to listen on."""
        return "127.0.0.1" if self.host == "localhost" else self.host


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise PolicyError(f"{name} is {value!r}: it must be {rule}")
