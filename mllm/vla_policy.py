"""The policy that runs a vision-language-action model, and its named constructors."""

from __future__ import annotations

import time

import numpy as np
import torch

from mllm.actions import ActionStatistics, ActionTokens, gripper_to_command
from mllm.config import VLAConfig, named_config
from mllm.decoder import TokenHook
from mllm.errors import PolicyError
from mllm.generate import ActionDecoder
from mllm.policy import ActionSpec, ActionStep, Observation
from mllm.preprocess import Preprocess
from mllm.tokenizer import Tokenizer, WordTokenizer
from mllm.vla import VLA, init_random


class VLAPolicy:
    """Answers an observation with the model's greedy action.

    statistics: name in `VLAConfig.statistics` of the data set whose units the model's actions have; None for the only
    one there is, or, where there is none, for actions that are commands already.
    restricted, hook: see `mllm.generate.ActionDecoder`.
    threads: of torch on the CPU, for the whole process; None leaves them.
    """

    action_spec = ActionSpec()

    def __init__(
        self,
        model: VLA,
        tokenizer: Tokenizer,
        *,
        statistics: str | None = None,
        restricted: bool = True,
        hook: TokenHook | None = None,
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            if not 1 <= threads <= 1024:
                raise PolicyError(f"threads is {threads}: it must be from 1 to 1024")
            torch.set_num_threads(threads)
        config = model.config
        if config.action_dim != 7:
            raise PolicyError(f"the model's actions have {config.action_dim} numbers: a policy's have 7")
        self.model, self.config, self.tokenizer = model.eval(), config, tokenizer
        self._statistics = choose_statistics(config, statistics)
        self.preprocess = Preprocess(config)
        self._tokens = ActionTokens(config.action_bins, config.token_vocab)
        self.decoder = ActionDecoder(model, restricted, hook)
        self._text: list[int] | None = None

    def reset(self, instruction: str) -> None:
        """Starts an episode. Raises PolicyError: no instruction, or one that leaves the model no room."""
        self._text = self.tokenizer.prompt(instruction)

    def warm_up(self) -> None:
        """Runs the model once on a made-up observation, so that the first real one does not pay for allocations."""
        text, self._text = self._text, self._text or self.tokenizer.prompt("do nothing")
        try:
            self.act(make_example(self.config))
        finally:
            self._text = text

    @torch.inference_mode()
    def act(self, observation: Observation) -> ActionStep:
        """The action for one instant, and seconds spent on "preprocess", "vision", "prefill" and "decode".

        flags: "prompt_tokens". Raises PolicyError: no episode, or an observation without the model's cameras.
        """
        if self._text is None:
            raise PolicyError("no episode has begun: call reset(instruction) before act()")
        clock = [time.perf_counter()]

        def lap() -> None:
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)
            clock.append(time.perf_counter())

        pixels = torch.from_numpy(self.preprocess(observation.images))[None].to(self.model.device, self.model.dtype)
        lap()
        visual = self.model.visual_tokens(pixels)
        lap()
        prompt = self.model.prompt(visual, [self._text])
        first = self.decoder.prefill(*prompt)
        lap()
        tokens = self.decoder.decode(first)[0].cpu().numpy()
        action = self.command(tokens[: self.config.action_dim])
        lap()
        stages = ("preprocess", "vision", "prefill", "decode")
        timing = {stage: after - before for stage, before, after in zip(stages, clock[:-1], clock[1:], strict=True)}
        return ActionStep(action, timing, {"prompt_tokens": int(prompt[0].shape[1])})

    def command(self, tokens: np.ndarray) -> np.ndarray:
        """tokens: (..., 7) ids. Returns (..., 7) float32 commands in [-1, 1], as `ActionSpec` says."""
        values = self._tokens.decode(tokens)
        if self._statistics is not None:
            values = self._statistics.unnormalise(values)
        return np.clip(gripper_to_command(values, self.config.gripper), -1.0, 1.0).astype(np.float32)


def choose_statistics(config: VLAConfig, name: str | None) -> ActionStatistics | None:
    """The statistics called `name`; see `VLAPolicy`. Raises PolicyError: no such name, or several and none chosen."""
    known = config.statistics
    if name is None and len(known) <= 1:
        return next(iter(known.values()), None)
    # OpenVLA's data sets without still frames have a suffix that its users leave out.
    for candidate in (str(name), f"{name}_no_noops"):
        if candidate in known:
            return known[candidate]
    shown = ", ".join(sorted(known)) or "none"
    raise PolicyError(f"there are no action statistics called {name!r}; choose one of: {shown}")


def make_example(config: VLAConfig) -> Observation:
    """An observation that the model of `config` can answer: grey images, for smoke tests and warm-up."""
    side = 2 * config.image_size
    return Observation({camera: np.full((side, side, 3), 127, np.uint8) for camera in config.cameras})


def random_policy(name: str, seed: int, threads: int | None, dtype: torch.dtype = torch.float32) -> VLAPolicy:
    """The named model with random weights and the words of LIBERO."""
    config = named_config(name)
    tokenizer = WordTokenizer()
    if tokenizer.size > config.action_ids[0]:
        raise PolicyError(f"'{name}' has room for {config.action_ids[0]} words: the vocabulary has {tokenizer.size}")
    return VLAPolicy(init_random(VLA(config), seed).to(dtype), tokenizer, threads=threads)


def mini_policy(checkpoint: str = "", seed: int = 0, threads: int | None = None, statistics: str = "") -> VLAPolicy:
    """The `mini` of the `flashvla.policies` group.

    checkpoint: a folder that `mllm.checkpoint.save_checkpoint` wrote; without it, random weights by `seed`.
    threads, statistics: see `VLAPolicy`.
    """
    if not checkpoint:
        return random_policy("mini", seed, threads)
    from mllm.checkpoint import load_checkpoint

    model, tokenizer = load_checkpoint(checkpoint)
    return VLAPolicy(model, tokenizer, statistics=statistics or None, threads=threads)
