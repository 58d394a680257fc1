"""Bins, quantiles and grippers: each transform against its definition and its inverse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mllm.actions import ActionStatistics, ActionTokens, gripper_from_command, gripper_to_command
from mllm.errors import PolicyError

OPENVLA = ActionTokens(256, 32000)
VALUES = hnp.arrays(np.float64, 7, elements=st.floats(-1, 1))


@given(hnp.arrays(np.int64, 7, elements=st.integers(31744, 31999)))
def test_every_action_token_survives_its_value_except_the_one_above_the_last_centre(ids):
    back = OPENVLA.encode(OPENVLA.decode(ids))
    assert np.array_equal(back, np.maximum(ids, 31745))


@given(VALUES)
def test_a_value_comes_back_within_half_a_bin(values):
    assert np.abs(OPENVLA.decode(OPENVLA.encode(values)) - values).max() <= 1 / 255 + 1e-12


@given(hnp.arrays(np.float64, 7, elements=st.floats(allow_nan=False, allow_infinity=True)))
def test_a_value_outside_is_the_nearest_end(values):
    assert np.array_equal(OPENVLA.encode(values), OPENVLA.encode(np.clip(values, -1, 1)))


def test_the_tokens_are_the_last_of_the_vocabulary_and_fall_as_the_value_rises():
    assert OPENVLA.encode(np.array([-1.0, -0.999, 0.0, 0.999, 1.0])).tolist() == [31999, 31999, 31872, 31745, 31744]
    assert len(OPENVLA.centres) == 255
    assert OPENVLA.centres[127] == 0


def test_what_is_no_action_token_counts_as_the_nearest():
    assert np.array_equal(OPENVLA.decode(np.array([0, 31744, 32063])), OPENVLA.centres[[254, 254, 0]])


@st.composite
def statistics(draw):
    low = draw(hnp.arrays(np.float64, 7, elements=st.floats(-10, 10)))
    span = draw(hnp.arrays(np.float64, 7, elements=st.floats(0.01, 10)))
    mask = draw(hnp.arrays(np.bool_, 7))
    return ActionStatistics(tuple(low), tuple(low + span), tuple(mask))


@given(statistics(), VALUES)
def test_normalising_undoes_unnormalising(numbers, values):
    assert np.allclose(numbers.normalise(numbers.unnormalise(values)), values, atol=1e-9)


@given(statistics(), VALUES)
def test_unnormalised_values_lie_between_the_quantiles_and_unmasked_ones_pass(numbers, values):
    actions, mask = numbers.unnormalise(values), np.array(numbers.mask)
    assert np.array_equal(actions[~mask], values[~mask])
    assert (actions[mask] >= np.array(numbers.low)[mask] - 1e-9).all()
    assert (actions[mask] <= np.array(numbers.high)[mask] + 1e-9).all()


@given(statistics())
def test_statistics_survive_their_file(numbers):
    assert ActionStatistics.from_json("x", numbers.to_json()) == numbers


def test_a_number_that_never_moves_is_its_constant_both_ways():
    still = ActionStatistics((2.0,), (2.0,))
    assert still.unnormalise(np.array([0.3])) == 2
    assert still.normalise(np.array([2.0])) == 0


@pytest.mark.parametrize(
    ("low", "high", "mask"),
    [
        ((0.0,), (1.0, 2.0), ()),
        ((2.0,), (1.0,), ()),
        ((float("nan"),), (1.0,), ()),
        ((), (), ()),
        ((0.0,), (1.0,), (True, True)),
    ],
)
def test_statistics_that_make_no_sense_are_refused(low, high, mask):
    with pytest.raises(PolicyError, match="action statistics"):
        ActionStatistics(low, high, mask)


def test_an_opening_becomes_a_command_and_back():
    opening = np.array([[0.1, 0.0], [0.2, 1.0], [0.3, 0.996], [0.4, 0.2]])
    command = gripper_to_command(opening, "opening")
    assert np.array_equal(command[:, 1], [1, -1, -1, 1])  # 0 closed is +1 close, 1 open is -1 open
    assert np.array_equal(command[:, 0], opening[:, 0])
    assert np.array_equal(gripper_from_command(command, "opening")[:, 1], [0, 1, 1, 0])
    assert gripper_to_command(opening, "command") is opening
    assert gripper_from_command(opening, "command") is opening
