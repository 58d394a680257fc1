"""Recordings of scripted episodes: for demonstrations of the loop that need no model, and tests that it is exact."""

from __future__ import annotations

from mllm.recording import Recording
from sim.env import LiberoEnv
from sim.errors import SimError
from sim.expert import make_expert
from sim.rollout import rollout


def record_episode(env: LiberoEnv, init_state: int | str = 0, seed: int | None = None) -> Recording:
    """One successful episode of the scripted expert in `env`.

    init_state: number of an official initial state, or "sampled".  seed: None is the environment's own.
    The metadata name the episode and what its states depend on, so that `mllm.replay.ReplayPolicy` can repeat it:
    suite, task, init_state, seed, instruction, renderer, stepper, settle_steps, outcome, and the versions of mujoco,
    robosuite and libero.
    Raises ConfigurationError: the expert cannot do this task.  Raises SimError: the episode is not a success.
    """
    seed = env.config.seed if seed is None else seed
    episode = rollout(env, make_expert(env), init_state, seed)
    if episode.outcome != "success":
        raise SimError(
            f"nothing to record: {episode.suite} task {episode.task}, initial state {init_state}, seed {seed} ended in "
            f"{episode.outcome} after {episode.steps} steps{': ' + episode.error if episode.error else ''}"
        )
    kept = (
        "suite",
        "task",
        "init_state",
        "seed",
        "instruction",
        "outcome",
        "stepper",
        "settle_steps",
        "mujoco",
        "robosuite",
        "libero",
    )
    full = episode.recording()
    return Recording(full.actions, {key: full.metadata[key] for key in kept} | {"renderer": env.config.renderer})
