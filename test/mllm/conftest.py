"""Small random models, and the settings under which equal numbers stay equal."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def _two_threads_and_a_seed():
    torch.set_num_threads(2)
    torch.manual_seed(0)
