"""Approximate time synchronisation: fresh, complete, never twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flashvla_ros.sync import ApproximateSync

MS = 1_000_000


def test_equal_stamps_form_a_set_with_the_last_message():
    sync = ApproximateSync(["left", "right"], 10 * MS)
    assert sync.add("left", 100 * MS, "L") is None
    assert sync.add("right", 100 * MS, "R") == (100 * MS, {"left": "L", "right": "R"})


def test_stamps_within_the_slop_form_a_set_stamped_with_the_newest():
    sync = ApproximateSync(["left", "right"], 10 * MS)
    sync.add("left", 100 * MS, "L")
    assert sync.add("right", 109 * MS, "R") == (109 * MS, {"left": "L", "right": "R"})


def test_stamps_beyond_the_slop_wait():
    sync = ApproximateSync(["left", "right"], 10 * MS)
    sync.add("left", 100 * MS, "L1")
    assert sync.add("right", 111 * MS, "R") is None
    assert sync.add("left", 112 * MS, "L2") == (112 * MS, {"left": "L2", "right": "R"})
    assert sync.unmatched == 1


def test_late_message_does_not_bring_an_old_set_back():
    sync = ApproximateSync(["left", "right"], 10 * MS)
    sync.add("left", 100 * MS, "L1")
    sync.add("left", 150 * MS, "L2")
    assert sync.add("right", 150 * MS, "R2") is not None
    assert sync.add("right", 100 * MS, "R1") is None


def test_time_going_back_starts_anew():
    sync = ApproximateSync(["left", "right"], 10 * MS)
    for name in ("left", "right"):
        sync.add(name, 10_000 * MS, name)
    assert sync.add("left", 50 * MS, "L") is None
    assert sync.add("right", 50 * MS, "R") == (50 * MS, {"left": "L", "right": "R"})


def test_memory_is_bounded_when_one_input_is_silent():
    sync = ApproximateSync(["left", "right"], 10 * MS)
    for step in range(1000):
        assert sync.add("left", step * MS, step) is None
    assert sync.unmatched == 1000 - 8


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 900)), max_size=200), st.integers(0, 50))
def test_every_set_is_complete_within_slop_newer_than_the_last(arrivals, slop):
    sync = ApproximateSync("abc", slop * MS)
    last = -1
    for name, stamp in arrivals:
        found = sync.add(name, stamp * MS, (name, stamp * MS))
        if found is None:
            continue
        newest, messages = found
        assert set(messages) == set("abc")
        assert all(messages[key][0] == key for key in messages)
        stamps = [stamp for _, stamp in messages.values()]
        assert max(stamps) == newest > last
        assert max(stamps) - min(stamps) <= slop * MS
        last = newest
