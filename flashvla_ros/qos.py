"""Quality of service as one readable parameter string: "reliable depth=5", "best_effort depth=1 transient_local"."""

from __future__ import annotations

from typing import Any

from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

from flashvla_ros.errors import ConfigurationError

_RELIABILITY = {"reliable": ReliabilityPolicy.RELIABLE, "best_effort": ReliabilityPolicy.BEST_EFFORT}
_DURABILITY = {"volatile": DurabilityPolicy.VOLATILE, "transient_local": DurabilityPolicy.TRANSIENT_LOCAL}
MAX_DEPTH = 10_000


def parse_qos(text: str, parameter: str = "qos") -> QoSProfile:
    """Reads a QoS string: words in any order, one of each at most.

    reliable | best_effort (default reliable); volatile | transient_local (default volatile); depth=N (default 10).
    Raises ConfigurationError naming `parameter` and the word that is wrong.
    """
    found: dict[str, Any] = {}
    for word in text.split():
        value: Any
        if word in _RELIABILITY:
            key, value = "reliability", _RELIABILITY[word]
        elif word in _DURABILITY:
            key, value = "durability", _DURABILITY[word]
        elif word.startswith("depth=") and word[6:].isdigit() and 1 <= int(word[6:]) <= MAX_DEPTH:
            key, value = "depth", int(word[6:])
        else:
            raise ConfigurationError(
                f"parameter '{parameter}' is {text!r}: '{word}' is not one of reliable, best_effort, volatile, "
                f"transient_local, depth=N (1 to {MAX_DEPTH})"
            )
        if key in found:
            raise ConfigurationError(f"parameter '{parameter}' is {text!r}: it sets {key} twice")
        found[key] = value
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=found.get("depth", 10),
        reliability=found.get("reliability", ReliabilityPolicy.RELIABLE),
        durability=found.get("durability", DurabilityPolicy.VOLATILE),
    )


LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
RELIABLE = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)
