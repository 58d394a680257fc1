"""The codec against openpi-client's own, both ways, and against what nobody should send."""

from __future__ import annotations

import math
import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from openpi_client import msgpack_numpy

from mllm import wire
from mllm.wire import WireError, pack, unpack

SIDES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
NUMBERS = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
)
TEXTS = st.one_of(hnp.byte_string_dtypes(endianness="?", max_len=5), hnp.unicode_string_dtypes(max_len=5))
ARRAYS = hnp.arrays(st.one_of(NUMBERS, TEXTS), SIDES)
SCALARS = hnp.arrays(NUMBERS, ()).map(lambda array: array[()])
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary())
VALUES = st.recursive(
    st.one_of(PLAIN, ARRAYS, SCALARS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4)),
    max_leaves=8,
)


def same(left, right):
    """Equal in type, dtype, shape and value, where NaN equals itself."""
    if isinstance(left, np.ndarray | np.generic):
        return (
            type(left) is type(right)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and (left.tobytes() == right.tobytes())
        )
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return isinstance(right, list) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and math.isnan(left):
        return isinstance(right, float) and math.isnan(right)
    return type(left) is type(right) and left == right


@given(VALUES)
def test_packs_to_the_bytes_of_openpi_client(value):
    assert pack(value) == msgpack_numpy.packb(value)


@given(VALUES)
def test_reads_what_openpi_client_reads(value):
    message = msgpack_numpy.packb(value)
    assert same(unpack(message), msgpack_numpy.unpackb(message))


@given(VALUES)
def test_openpi_client_reads_what_we_pack(value):
    assert same(msgpack_numpy.unpackb(pack(value)), unpack(pack(value)))


@given(ARRAYS)
def test_an_array_comes_back_as_it_was(array):
    read = unpack(pack(array))
    assert (read.dtype, read.shape) == (array.dtype, array.shape)
    assert read.tobytes() == array.tobytes()


@pytest.mark.parametrize("view", [np.s_[:, ::-1], np.s_[::2, 1:], np.s_[..., None]])
def test_a_view_that_is_not_contiguous_comes_back_as_it_was(view):
    array = np.arange(24.0).reshape(4, 6)
    np.testing.assert_array_equal(unpack(pack(array[view])), array[view])
    np.testing.assert_array_equal(unpack(pack(array.T)), array.T)


@pytest.mark.parametrize("value", [np.array([object()]), np.zeros(2, "V3"), np.zeros(2, complex), np.longdouble(1)])
def test_what_openpi_client_refuses_or_no_other_machine_reads_is_not_packed(value):
    with pytest.raises(WireError, match=r"dtype .* is not allowed"):
        pack(value)


@pytest.mark.parametrize("value", [object(), {1, 2}, 2**64, {"deep": {"er": object}}])
def test_what_is_not_data_is_not_packed(value):
    with pytest.raises(WireError):
        pack(value)


def array_message(data=b"\0" * 4, dtype="<f4", shape=(1,), **more):
    return msgpack.packb({b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape, **more})


@pytest.mark.parametrize(
    "dtype",
    ["|O", "O", "|V8", "<c16", "<f16", "<M8[ns]", "i4,f4", "<U0", "<U999999", "<i4\n", "float", b"<f4", 7, None],
)
def test_a_dtype_beyond_numbers_and_text_is_refused(dtype):
    with pytest.raises(WireError, match="dtype"):
        unpack(array_message(dtype=dtype))


@pytest.mark.parametrize("shape", [(2,), (1, 2), (1, 1, 0), (2**62, 2**62), (2**63,), (2**32, 2**32)])
def test_an_array_needs_exactly_the_bytes_of_its_shape(shape):
    with pytest.raises(WireError):
        unpack(array_message(shape=shape))


@pytest.mark.parametrize("shape", [(-1,), (1.0,), (True,), "1", None, 1, {"1": 1}, ([1],)])
def test_a_shape_is_a_list_of_sides(shape):
    with pytest.raises(WireError, match="shape"):
        unpack(array_message(shape=shape))


def test_an_empty_array_cannot_claim_a_long_side():
    with pytest.raises(WireError, match="side of 1000000000"):
        unpack(array_message(data=b"", shape=(10**9, 0)))


def test_the_dimensions_are_limited():
    with pytest.raises(WireError, match="9 dimensions; the limit is 8"):
        unpack(array_message(shape=(1,) * 9))


def test_the_data_of_an_array_are_bytes():
    with pytest.raises(WireError, match="comes with a str"):
        unpack(array_message(data="abcd"))


def test_an_array_has_no_other_keys():
    message = {b"__ndarray__": True, b"data": b"", b"dtype": "<f4"}
    for wrong in (message, {**message, b"shape": [0], b"order": "F"}):
        with pytest.raises(WireError, match="needs data, dtype and shape"):
            unpack(msgpack.packb(wrong))


def test_a_boolean_is_0_or_1():
    with pytest.raises(WireError, match="boolean"):
        unpack(array_message(data=b"\2", dtype="|b1"))


@pytest.mark.parametrize(("order", "dtype"), [("little", "<U1"), ("big", ">U1")])
def test_text_stays_within_unicode(order, dtype):
    with pytest.raises(WireError, match="Unicode"):
        unpack(array_message(data=(0x110000).to_bytes(4, order), dtype=dtype))


@pytest.mark.parametrize(
    ("data", "dtype"), [(300, "|u1"), (-1, "<u4"), (1.5, "<i4"), (True, "<i4"), (1, "|b1"), (1e39, "<f4"), ("1", "<f4")]
)
def test_a_scalar_fits_its_dtype(data, dtype):
    with pytest.raises(WireError, match="scalar"):
        unpack(msgpack.packb({b"__npgeneric__": True, b"data": data, b"dtype": dtype}))


@pytest.mark.parametrize(
    "message",
    [b"", b"\xc1", b"\x92\x01", b"\x01\x02", b"\xa2\xff\xfe", b"\xd4\x01x", b"\xd6\xff\0\0\0\0", b"\x81\x01\x02"],
    ids=["nothing", "no type", "cut", "two values", "not UTF-8", "extension", "timestamp", "number as key"],
)
def test_what_is_not_one_plain_value_is_refused(message):
    with pytest.raises(WireError):
        unpack(message)


@pytest.mark.parametrize("value", [[0] * 1025, {str(i): 0 for i in range(1025)}, "x" * 65_537, [[0] * 1000] * 17])
def test_lists_maps_and_texts_are_limited(value):
    with pytest.raises(WireError):
        unpack(msgpack.packb(value))


@pytest.mark.parametrize(
    "message",
    [
        b"\x91" * 10**6,
        b"\xdd\xff\xff\xff\xff" * 10**5,
        b"\xdf\xff\xff\xff\xff" * 10**5,
        b"\xc6\xff\xff\xff\xff",
        b"\xdc\x04\x00" * 10**5,
        b"\xdc\x04\x00" + (b"\xdc\x04\x00" + b"\x80" * 1024) * 1024,
    ],
    ids=["deep", "long lists", "long maps", "long bytes", "deep and long", "many empty maps"],
)
def test_a_bomb_takes_little_memory(message):
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            unpack(message)
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(message):
    try:
        unpack(message)
    except WireError:
        return


@given(VALUES, st.data())
def test_a_damaged_message_is_read_or_refused(value, data):
    message = bytearray(pack(value))
    for _ in range(data.draw(st.integers(1, 3))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    try:
        unpack(bytes(message))
    except WireError:
        return


def test_the_limits_let_a_large_observation_through():
    images = {f"camera {i}": np.zeros((1080, 1920, 3), np.uint8) for i in range(3)}
    assert unpack(pack({"images": images})).keys() == {"images"}
    assert len(unpack(pack([0.0] * wire.MAX_LENGTH))) == wire.MAX_LENGTH
