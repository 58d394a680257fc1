"""Action recordings: exact round trips, and files that lie."""

from pathlib import Path

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mllm.errors import PolicyError
from mllm.recording import MAX_BYTES, Recording, load_recording, save_recording

ACTIONS = arrays.arrays(np.float32, st.tuples(st.integers(1, 20), st.just(7)), elements=st.floats(-1, 1, width=32))
METADATA = st.dictionaries(st.text(max_size=20), st.text(max_size=50), max_size=5)


@given(actions=ACTIONS, metadata=METADATA)
def test_what_is_saved_is_loaded_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory, actions: np.ndarray, metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.safetensors"
    save_recording(path, Recording(actions, metadata))
    loaded = load_recording(path)
    assert loaded.actions.tobytes() == actions.tobytes()
    assert loaded.metadata == metadata


@pytest.mark.parametrize(
    ("actions", "complaint"),
    [
        (np.zeros((3, 7)), "float64"),
        (np.zeros((3, 6), np.float32), "shape"),
        (np.zeros((0, 7), np.float32), "shape"),
        (np.full((3, 7), np.nan, np.float32), "nan"),
        (np.full((3, 7), 1.5, np.float32), "1.5"),
    ],
)
def test_impossible_actions_are_refused_by_value(actions: np.ndarray, complaint: str) -> None:
    with pytest.raises(PolicyError, match=complaint):
        Recording(actions)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no recording at"):
        load_recording(tmp_path / "none.safetensors")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    path.write_text("not a tensor in sight")
    with pytest.raises(PolicyError, match="not a safetensors file"):
        load_recording(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    save_recording(path, Recording(np.zeros((5, 7), np.float32)))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(PolicyError, match="not a safetensors file"):
        load_recording(path)


def test_an_oversized_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(PolicyError, match="at most"):
        load_recording(path)


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weights": np.zeros((2, 2), np.float32)}, path)
    with pytest.raises(PolicyError, match="weights"):
        load_recording(path)
