"""The policy that plays a recording back: it proves that a loop is exact, and needs no model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mllm.errors import PolicyError
from mllm.policy import ActionSpec, ActionStep, Observation
from mllm.recording import load_recording


class ReplayPolicy:
    """Answers the n-th observation of an episode with the n-th recorded action.

    episode: a file written by `mllm.recording.save_recording`.
    after_end: "error" (default: an observation beyond the recording is a PolicyError) or "hold" (no motion, last
    gripper command).
    """

    action_spec = ActionSpec()

    def __init__(self, episode: str, after_end: str = "error") -> None:
        if after_end not in ("error", "hold"):
            raise PolicyError(f"after_end is {after_end!r}: it must be 'error' or 'hold'")
        self.recording = load_recording(Path(episode))
        self._after_end = after_end
        self._next = 0

    def reset(self, instruction: str) -> None:
        self._next = 0

    def act(self, observation: Observation) -> ActionStep:
        actions = self.recording.actions
        index, self._next = self._next, self._next + 1
        if index < len(actions):
            return ActionStep(actions[index], flags={"replayed": index})
        if self._after_end == "error":
            raise PolicyError(
                f"the recording has {len(actions)} actions and the episode goes on: it was recorded "
                "elsewhere, or the loop is not exact"
            )
        return ActionStep(np.append(np.zeros(6, np.float32), actions[-1, 6]), flags={"replayed": len(actions) - 1})
