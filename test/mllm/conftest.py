"""Two threads and a seed for every test that uses torch; the others run without it."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _two_threads_and_a_seed():
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(2)
        torch.manual_seed(0)
