"""The policy that runs a vision-language-action model, and its named constructors."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllm.actions import ActionStatistics, ActionTokens, gripper_to_command
from mllm.compress import CompressConfig
from mllm.config import VLAConfig, named_config
from mllm.decoder import TokenHook
from mllm.digest import DIGEST, weights_digest
from mllm.engine import compile_model
from mllm.errors import PolicyError
from mllm.flops import step_flops, visual_flops
from mllm.generate import ActionDecoder, Choice, compressor
from mllm.hf_config import WEIGHTS
from mllm.policy import PROPRIO_SIZES, ActionSpec, ActionStep, Observation, TokenLayout
from mllm.preprocess import CROP_AREA, Preprocess
from mllm.tokenizer import Tokenizer, WordTokenizer
from mllm.vla import VLA, init_random


@dataclass
class VLAEpisode:
    """What a policy remembers of one episode.

    text: ids of the instruction.  chunk: what is left of one, (n, 7) commands.  answer: the tokens that a causal
    model said last.
    """

    text: list[int]
    chunk: np.ndarray = field(default_factory=lambda: np.empty((0, 7), np.float32))
    answer: Tensor | None = None


class VLAPolicy:
    """Answers observations with the model's greedy actions; of a chunk it carries out `execute` before it looks again.

    statistics: name in `VLAConfig.statistics` of the data set whose units the model's actions have; None for the only
    one there is, or, where there is none, for actions that are commands already.
    restricted, hook: see `mllm.generate.ActionDecoder`.
    compress: which visual tokens the decoder keeps, in place of a hook; may be set between two actions too, and holds
        from the next frame that the model looks at. Setting it raises PolicyError where the model cannot keep so many.
    threads: of torch on the CPU, for the whole process; None leaves them. For a model like the mini more than one pay
        only on free cores with OMP_WAIT_POLICY=active; see `mllm`.
    execute: 1 to the model's chunk; None is the checkpoint's own.
    compile: see `mllm.engine.compile_model`; `reset` then takes as long as an instruction of a new length does.
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
        compress: CompressConfig | None = None,
        threads: int | None = None,
        execute: int | None = None,
        compile: bool = False,
    ) -> None:
        if threads is not None:
            if not 1 <= threads <= 1024:
                raise PolicyError(f"threads is {threads}: it must be from 1 to 1024")
            torch.set_num_threads(threads)
        config = model.config
        if config.action_dim != 7:
            raise PolicyError(f"the model's actions have {config.action_dim} numbers: a policy's have 7")
        self.execute = config.execute if execute is None else execute
        if not 1 <= self.execute <= config.chunk:
            raise PolicyError(f"execute is {execute}: it must be from 1 to the model's chunk of {config.chunk}")
        self.model, self.config, self.tokenizer = model.eval(), config, tokenizer
        self.render = dict(config.render)
        self._statistics = choose_statistics(config, statistics)
        side = math.isqrt(model.vision_backbone.tokens // len(config.cameras))
        area = CROP_AREA if config.images.centre_crop else 1.0
        self.layout = TokenLayout(config.cameras, side, side, area, config.images.mirror)
        self.preprocess = Preprocess(config)
        self._tokens = ActionTokens(config.action_bins, config.token_vocab)
        if compile:
            compile_model(model)
        if hook is not None and compress is not None:
            raise PolicyError(f"a hook was given beside {compress}: the decoder has one, so give one of them")
        self.decoder = ActionDecoder(model, restricted, hook)
        self._restricted, self._hooked = restricted, hook is not None
        self._flops: dict[tuple[int, int], dict[str, int]] = {}
        self._weight_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
        # Prompts of a new length are compiled and recorded before an episode, not in it.
        self._rehearses = compile or model.device.type == "cuda"
        self._episode: VLAEpisode | None = None
        self._compress = CompressConfig()
        if compress is not None:
            self.compress = compress

    @property
    def compress(self) -> CompressConfig:
        return self._compress

    @compress.setter
    def compress(self, config: CompressConfig) -> None:
        self.decoder.hook = compressor(self.model, config)
        self._compress, self._hooked, self._flops = config, False, {}
        if self._episode is not None and self._rehearses:
            self._rehearse(self._episode.text)

    @cached_property
    def provenance(self) -> dict[str, str]:
        """Which weights answer; see `mllm.digest`."""
        return {DIGEST: weights_digest(self.model)}

    def configure(self, compress: str | Mapping[str, Any] | None = None, keep: int | None = None) -> None:
        """See `mllm.policy.Tunable` and `mini_policy`; what is not named stays as it is."""
        self.compress = CompressConfig.parse(compress or "", keep or None, self._compress)

    def reset(self, instruction: str) -> None:
        """Starts an episode. Raises PolicyError: no instruction, or one that leaves the model no room."""
        episode = self.begin(instruction)
        if self._rehearses:
            self._rehearse(episode.text)
        self._episode = episode

    def begin(self, instruction: str) -> VLAEpisode:
        """The state of one of several episodes at once; see `reset`."""
        text = self.tokenizer.prompt(instruction)
        self.model.check_room(len(text))
        return VLAEpisode(text)

    def warm_up(self) -> None:
        """Runs the model once on a made-up observation, so that the first real one does not pay for allocations."""
        self._rehearse(self.begin("do nothing").text)

    def _rehearse(self, text: list[int]) -> None:
        self.act_batch([VLAEpisode(text)], [make_example(self.config)])

    def act(self, observation: Observation) -> ActionStep:
        """See `act_batch`. Raises PolicyError: no episode has begun."""
        if self._episode is None:
            raise PolicyError("no episode has begun: call reset(instruction) before act()")
        return self.act_batch([self._episode], [observation])[0]

    @torch.inference_mode()
    def act_batch(self, episodes: Sequence[VLAEpisode], observations: Sequence[Observation]) -> list[ActionStep]:
        """The actions for one instant of several episodes, and seconds that all of them together spent on
        "preprocess", "vision", "select" (where the decoder may drop tokens), "prefill" (the rest of it) and "decode";
        none where the action is left of an earlier chunk.

        flags: "prompt_tokens" where the model ran, and what that costs: "weight_bytes" of the weights, without copies
        that `mllm.kernels` lays out, and of `mllm.flops` "flops" (of the whole look) and "visual_flops"; "chunk_step",
        the number of the action, where chunks have several; "passes", where the model is causal, that its answer took
        to decode.
        Raises PolicyError: an observation without what the model looks at, or with NaN or infinity in it, or what
        `ActionDecoder.check` raises.
        """
        looking = {i for i, episode in enumerate(episodes) if not len(episode.chunk)}
        timing: dict[str, float] = {}
        seen: dict[int, dict[str, np.ndarray | None]] = {}
        length = 0
        if looking:
            places = sorted(looking)
            asked = [episodes[i] for i in places], [observations[i] for i in places]
            chunks, choice, timing, length = self._infer(*asked)
            tokens = choice.visual(len(places), self.model.vision_backbone.tokens)
            for i, chunk, (kept, merged) in zip(places, chunks, tokens, strict=True):
                episodes[i].chunk = chunk[: self.execute]
                seen[i] = {"kept": kept, "merged": merged, "plan": chunk if self.config.chunk > 1 else None}
        steps = []
        for i, episode in enumerate(episodes):
            flags: dict[str, int] = {"chunk_step": self.execute - len(episode.chunk)} if self.config.chunk > 1 else {}
            if i in looking:
                flags |= {"prompt_tokens": length, "weight_bytes": self._weight_bytes}
                flags |= self._operations(len(episode.text))
            action, episode.chunk = episode.chunk[0], episode.chunk[1:]
            spent = timing if i in looking else {}
            left = len(episode.chunk)
            steps.append(ActionStep(action, spent, flags, **seen.get(i, {}), left=left, looks=not left))
        return steps

    def _operations(self, words: int) -> dict[str, int]:
        """Flags of the last look, with an instruction of so many tokens; of operations none where a hook of somebody
        else's chooses.
        """
        passes = self.decoder.passes
        flags = {"passes": passes} if passes else {}
        if self._hooked:
            return flags
        if (words, passes) not in self._flops:
            whole = step_flops(self.model, words, self._compress, self._restricted, passes)["step"]
            decoder, tokens = self.config.decoder, self.model.vision_backbone.tokens
            visual = visual_flops(decoder, tokens, self._compress)
            self._flops[words, passes] = {**flags, "flops": whole, "visual_flops": visual}
        return self._flops[words, passes]

    def _infer(
        self, episodes: list[VLAEpisode], observations: list[Observation]
    ) -> tuple[np.ndarray, Choice, dict[str, float], int]:
        """Returns (B, chunk, 7) commands, which tokens were kept, seconds a stage, and the prompt's length."""
        clock = [time.perf_counter()]

        def lap() -> None:
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)
            clock.append(time.perf_counter())

        images = np.stack([self.preprocess(observation.images) for observation in observations])
        pixels = torch.from_numpy(images).to(self.model.device, self.model.dtype)
        proprio = self._proprio(observations)
        lap()
        visual = self.decoder.visual_tokens(pixels)
        lap()
        prompt = self.model.prompt(visual, [episode.text for episode in episodes], proprio)
        first = self.decoder.prefill(*prompt)
        lap()
        # From one look to the next an action changes little (our choice).
        before = [episode.answer for episode in episodes if episode.answer is not None]
        answer = self.decoder.decode(first, torch.stack(before) if len(before) == len(episodes) else None)
        self.decoder.check()
        if self.decoder.passes:
            for episode, row in zip(episodes, answer, strict=True):
                episode.answer = row
        commands = self.command(answer.float().cpu().numpy())
        lap()
        preprocess, vision, prefill, decode = (after - before for before, after in pairwise(clock))
        timing, choice = {"preprocess": preprocess, "vision": vision}, self.decoder.choice
        if self.decoder.hook is not None:
            timing["select"] = choice.seconds
        timing |= {"prefill": prefill - choice.seconds, "decode": decode}
        return commands, choice, timing, int(prompt[0].shape[1])

    def _proprio(self, observations: list[Observation]) -> Tensor | None:
        statistics = self.config.proprio_statistics
        if statistics is None:
            return None
        rows = [proprio_vector(observation, self.config.proprio) for observation in observations]
        if rows[0].shape != (len(statistics.low),):
            raise PolicyError(
                f"proprioception {', '.join(self.config.proprio)} has {rows[0].size} numbers: the model was trained on "
                f"{len(statistics.low)}"
            )
        return torch.from_numpy(statistics.normalise(np.stack(rows))).to(self.model.device, self.model.dtype)

    def command(self, answer: np.ndarray) -> np.ndarray:
        """answer: what `ActionDecoder.decode` gives of B samples. Returns (B, chunk, 7) float32 commands in [-1, 1], as
        `ActionSpec` says.
        """
        if self.config.head == "tokens":
            answer = self._tokens.decode(answer.astype(np.int64)).reshape(len(answer), self.config.chunk, -1)
        if self._statistics is not None:
            answer = self._statistics.unnormalise(answer)
        return np.clip(gripper_to_command(answer, self.config.gripper), -1.0, 1.0).astype(np.float32)


def proprio_vector(observation: Observation, names: Sequence[str]) -> np.ndarray:
    """The named numbers side by side, float64. Raises PolicyError: one is missing, NaN or infinity."""
    missing = [name for name in names if name not in observation.proprio]
    if missing:
        raise PolicyError(
            f"the observation lacks proprioception '{missing[0]}'; it has "
            f"{', '.join(sorted(observation.proprio)) or 'none'}"
        )
    for name in names:
        if not np.isfinite(observation.proprio[name]).all():
            raise PolicyError(f"proprioception '{name}' is not finite: {observation.proprio[name]}")
    return np.concatenate([np.asarray(observation.proprio[name], np.float64) for name in names])


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
    images = {camera: np.full((side, side, 3), 127, np.uint8) for camera in config.cameras}
    return Observation(images, {name: np.zeros(PROPRIO_SIZES[name]) for name in config.proprio})


def random_policy(
    name: str, seed: int, threads: int | None, dtype: torch.dtype = torch.float32, **options: Any
) -> VLAPolicy:
    """The named model with random weights and the words of LIBERO; options: of `VLAPolicy`."""
    config = named_config(name)
    tokenizer = WordTokenizer()
    if tokenizer.size > config.action_ids[0]:
        raise PolicyError(f"'{name}' has room for {config.action_ids[0]} words: the vocabulary has {tokenizer.size}")
    return VLAPolicy(init_random(VLA(config), seed).to(dtype), tokenizer, threads=threads, **options)


def mini_policy(
    checkpoint: str = "",
    seed: int | None = None,
    threads: int | None = 1,
    statistics: str = "",
    execute: int | None = None,
    dtype: str = "float32",
    compile: bool = False,
    compress: str | Mapping[str, Any] = "none",
    keep: int | None = None,
) -> VLAPolicy:
    """The `mini` of the `flashvla.policies` group.

    checkpoint: a folder that `mllm.checkpoint.save_checkpoint` wrote; without it, the weights that come with the
    package, or with a seed random ones.
    dtype: "float32", or "bfloat16", which rounds to three digits and is faster where the processor multiplies it.
    threads, statistics, execute, compile: see `VLAPolicy`.
    compress, keep: see `mllm.compress.CompressConfig`: a method and the visual tokens that it keeps, such as "flashvla"
    and 80; or in place of the method a mapping of any of its fields, {"method": "flashvla", "centre": true}.
    """
    if dtype not in ("float32", "bfloat16"):
        raise PolicyError(f"dtype is {dtype!r}: choose float32 or bfloat16")
    precision, chosen = getattr(torch, dtype), CompressConfig.parse(compress, keep)
    if seed is not None:
        if checkpoint:
            raise PolicyError(f"seed is {seed} and checkpoint {checkpoint!r}: random weights, or these, not both")
        return random_policy("mini", seed, threads, precision, compile=compile, compress=chosen)
    from mllm.checkpoint import load_checkpoint

    model, tokenizer = load_checkpoint(checkpoint or WEIGHTS / "mini", dtype=precision)
    return VLAPolicy(
        model,
        tokenizer,
        statistics=statistics or None,
        compress=chosen,
        threads=threads,
        execute=execute,
        compile=compile,
    )


# The `mini-ar` of that group: one action of seven tokens, one after the other, as OpenVLA's.
mini_ar_policy = partial(mini_policy, checkpoint=str(WEIGHTS / "mini-ar"))
