"""What a policy says and sees in each step of an episode, kept beside the rollout; and the images as a video."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from mllm.policy import ActionStep, Observation, Policy

VIDEO_FPS = 20
VIDEO_SIDE = 256  # pixels; larger images are halved until they fit


class StepLog:
    """`policy`, with its stages' timing and its flags of every step kept, and, where `frames`, what it saw."""

    def __init__(self, policy: Policy, frames: bool = False) -> None:
        self._policy, self._keep_frames = policy, frames
        self.action_spec = policy.action_spec
        self.timing: list[Mapping[str, float]] = []
        self.flags: list[Mapping[str, Any]] = []
        self.frames: list[np.ndarray] = []

    def reset(self, instruction: str) -> None:
        self.timing, self.flags, self.frames = [], [], []
        self._policy.reset(instruction)

    def act(self, observation: Observation) -> ActionStep:
        if self._keep_frames and observation.images:
            self.frames.append(np.hstack(list(observation.images.values())))
        step = self._policy.act(observation)
        if self._keep_frames:
            step = replace(step, looks=True)
        self.timing.append(step.timing)
        self.flags.append(step.flags)
        return step

    def stages(self, steps: int) -> dict[str, np.ndarray]:
        """Stage -> (steps,) float64 s of the first `steps` steps, NaN where a step did not have the stage."""
        names = dict.fromkeys(stage for timing in self.timing[:steps] for stage in timing)
        return {name: np.array([t.get(name, np.nan) for t in self.timing[:steps]], float) for name in names}


def encode_video(frames: Sequence[np.ndarray]) -> bytes:
    """An MP4 (H.264) of (H, W, 3) uint8 RGB frames of one size, at 20 frames a second."""
    import av

    halvings = 0
    while frames[0].shape[0] >> halvings > VIDEO_SIDE:
        halvings += 1
    step = 1 << halvings
    height, width = (side // step - side // step % 2 for side in frames[0].shape[:2])  # yuv420p takes even sides only
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(VIDEO_FPS))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "26", "preset": "veryfast", "threads": "1"}
        for frame in frames:
            small = np.ascontiguousarray(frame[::step, ::step][:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(small, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()
