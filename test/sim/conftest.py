"""Fixtures of the simulation tests: building a scene takes seconds, so one serves a whole module."""

from collections.abc import Iterator

import pytest

from sim.env import EnvConfig, LiberoEnv


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    """A task with a cabinet, a stove and a rack, without cameras, of at most 5 steps."""
    made = LiberoEnv(EnvConfig(suite="libero_goal", task="turn on the stove", cameras=(), step_limit=5))
    yield made
    made.close()
