"""Parameters: checked at start and at run time, wrong ones named."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from rclpy.node import Node
from rclpy.parameter import Parameter

from flashvla_ros.errors import ConfigurationError
from flashvla_ros.fields import param, require_positive
from flashvla_ros.parameters import NodeParameters
from flashvla_ros.qos import parse_qos


@dataclass(frozen=True)
class Example:
    rate: float = param(20.0, "Hz", dynamic=True)
    name: str = param("a", "a name")
    topics: tuple[str, ...] = param(("x", "y"), "topics")
    count: int = param(3, "how many")
    on: bool = param(True, "on")

    def __post_init__(self) -> None:
        require_positive(self, "rate", "count")


@pytest.fixture
def make(ros):
    nodes = []

    def make_node(**overrides):
        node = Node(
            "example",
            context=ros.context,
            automatically_declare_parameters_from_overrides=True,
            parameter_overrides=[Parameter(name, value=value) for name, value in overrides.items()],
        )
        nodes.append(node)
        return node, NodeParameters(node, Example)

    yield make_node
    for node in nodes:
        node.destroy_node()


def test_defaults_are_declared_with_their_documentation(make):
    node, params = make()
    assert params.value == Example()
    assert node.get_parameter("rate").value == 20.0
    assert node.describe_parameter("rate").description == "Hz"


def test_overrides_win_and_integers_are_fine_for_floats_and_names(make):
    _, params = make(rate=5, name=0, topics=["z"])
    assert params.value == Example(rate=5.0, name="0", topics=("z",))
    assert isinstance(params.value.rate, float)


def test_empty_list_is_an_empty_tuple(make):
    assert make(topics=[""])[1].value.topics == ()


def test_misspelt_parameter_is_named_with_the_known_ones(make):
    with pytest.raises(ConfigurationError, match=r"'raet'.*it has: count, name, on, rate, topics"):
        make(raet=5.0)


@pytest.mark.parametrize(
    ("name", "value"), [("rate", "fast"), ("count", 2.5), ("on", 1), ("topics", "x"), ("count", True)]
)
def test_wrong_type_is_named(make, name, value):
    with pytest.raises(ConfigurationError, match=f"'{name}'"):
        make(**{name: value})


def test_wrong_value_is_named_with_its_limit(make):
    with pytest.raises(ConfigurationError, match=r"'rate' is -1.0.*above 0"):
        make(rate=-1.0)


def test_run_time_change_of_a_dynamic_parameter_takes_effect(make):
    node, params = make()
    assert node.set_parameters([Parameter("rate", value=7.0)])[0].successful
    assert params.value.rate == 7.0


def test_wrong_run_time_change_is_refused_and_changes_nothing(make):
    node, params = make()
    result = node.set_parameters([Parameter("rate", value=0.0)])[0]
    assert not result.successful
    assert "'rate' is 0.0" in result.reason
    assert params.value.rate == 20.0


def test_parameter_that_is_not_dynamic_cannot_change_at_run_time(make):
    node, params = make()
    assert not node.set_parameters([Parameter("name", value="b")])[0].successful
    assert params.value.name == "a"


def test_qos_words_in_any_order():
    qos = parse_qos("depth=3 transient_local best_effort")
    assert (qos.depth, qos.reliability.name, qos.durability.name) == (3, "BEST_EFFORT", "TRANSIENT_LOCAL")


@pytest.mark.parametrize("text", ["reliabel", "depth=0", "depth=x", "reliable best_effort", "depth=99999"])
def test_wrong_qos_is_named(text):
    with pytest.raises(ConfigurationError, match="image_qos"):
        parse_qos(text, "image_qos")
