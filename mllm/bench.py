"""What an action costs: ours against transformers' decoder run eagerly with the same weights, beside the floor.

The baseline is what OpenVLA's users run: timm's towers, then `LlamaForCausalLM.generate` over the whole vocabulary.
The floor is the work at this machine's own measured speed: multiplications at its matrix rate and, for the tokens that
follow the first, one reading of the decoder's weights at its memory bandwidth.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from mllm.config import NAMED, check_choice, named_config
from mllm.errors import PolicyError
from mllm.kernels import product
from mllm.policy import Observation
from mllm.tensor_names import places
from mllm.torchvision_import import import_timm
from mllm.vla import VLA, init_random
from mllm.vla_policy import VLAPolicy, make_example
from quant.timing import best_seconds, read_rate, wait

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class BenchConfig:
    """model: see `mllm.config.NAMED`.  steps: actions measured of each kind.  words: tokens of the instruction.

    device: "cpu" or "cuda".  dtype: "float32" or "bfloat16".  threads: of torch on the CPU.
    compile: ours by torch.compile; the baseline is eager as ever.
    """

    model: str = "mini"
    steps: int = 50
    words: int = 18
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 2
    compile: bool = False

    def __post_init__(self) -> None:
        check_choice(self, {"model": tuple(NAMED), "device": ("cpu", "cuda"), "dtype": tuple(DTYPES)})
        for name, high in (("steps", 10_000), ("words", 200), ("threads", 1024)):
            if not 1 <= getattr(self, name) <= high:
                raise PolicyError(f"BenchConfig.{name} is {getattr(self, name)}: it must be from 1 to {high}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise PolicyError("BenchConfig.device is 'cuda', and torch finds none here: choose 'cpu'")


class FixedTokenizer:
    """So many different ids, whatever the instruction says: a benchmark needs a length, not a meaning."""

    def __init__(self, count: int) -> None:
        self._ids = [1, *range(3, 2 + count)]

    def prompt(self, instruction: str) -> list[int]:
        return self._ids

    def word(self, text: str) -> int:
        return self._ids[-1]

    def save(self, folder: Any) -> None:
        raise PolicyError("a benchmark's tokenizer is not saved")


@torch.inference_mode()
def measure(config: BenchConfig | None = None) -> dict[str, Any]:
    """Measures ours and the baseline by turns, so that a slow moment of the machine falls on both.

    Returns what JSON can hold: "ours" and "baseline" with p50 and p99 milliseconds of every stage and of the whole
    "step"; "speedup" of the step's p50; "equal_tokens", whether both always chose the same (in bfloat16 random weights
    leave many a choice to rounding), and "equal_actions", the share of answers; "passes" that ours took to
    decode, mean; "floor_ms"; "achieved" rates at the p50, to compare with those of the "machine".
    """
    config = config or BenchConfig()
    torch.set_num_threads(config.threads)
    dtype, device = DTYPES[config.dtype], torch.device(config.device)
    # Made where it will run: a model of 7 billion weights need not fit this machine's memory twice.
    with torch.device("meta"):
        model = VLA(named_config(config.model)).to(dtype)
    init_random(model.to_empty(device=device), 0)
    # Unrestricted, like the baseline: both may choose any token, so that their choices can be compared.
    restricted = VLAPolicy(model, FixedTokenizer(config.words), compile=config.compile)
    unrestricted = VLAPolicy(model, FixedTokenizer(config.words), restricted=False)
    for policy in (restricted, unrestricted):
        policy.reset("")
        policy.warm_up()
    baseline = Baseline(_twin(model), config.words)
    images = [noise_observation(model, seed) for seed in range(config.steps)]
    baseline.act(images[0])
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    passes: list[int] = []
    equal = 0
    for observation in images:
        ours.append(_timed(lambda seen: restricted.act(seen).timing, observation))
        passes.append(restricted.decoder.passes)
        theirs.append(_timed(baseline.act, observation))
        pixels = torch.from_numpy(restricted.preprocess(observation.images))[None]
        tokens = unrestricted.decoder.generate(pixels, [baseline.ids])
        equal += bool(torch.equal(tokens, baseline.tokens))
    summaries = {"ours": stage_summary(ours), "baseline": stage_summary(theirs)}
    speeds = machine_speeds(dtype, device)
    work = count_work(model, config.words)
    return {
        "model": config.model,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **summaries,
        "speedup": round(summaries["baseline"]["step"]["p50_ms"] / summaries["ours"]["step"]["p50_ms"], 3),
        "equal_tokens": equal == config.steps,
        "equal_actions": round(equal / config.steps, 3),
        "passes": round(float(np.mean(passes)), 2),
        "floor_ms": floor(work, speeds),
        "achieved": achieved(work, summaries["ours"], float(np.median(passes))),
        "machine": {"device": device_name(device), "dtype": config.dtype, "threads": config.threads, **speeds},
        "compile": config.compile,
        "torch": torch.__version__,
    }


class Baseline:
    """The same weights in transformers' LlamaForCausalLM, and the vision towers run by themselves."""

    def __init__(self, model: VLA, words: int) -> None:
        import_timm()
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = model.config.decoder
        config = LlamaConfig(
            **{name: getattr(sizes, name) for name in sizes.__dataclass_fields__ if name != "rope_theta"},
            pad_token_id=0,
            eos_token_id=None,
        )
        with torch.device("meta"):
            llama: Any = LlamaForCausalLM(config)
        llama.to(model.dtype)
        own = model.language_model.state_dict()
        parts = {name: place.of(own) for name, place in places(list(own), sizes)}
        llama.load_state_dict(parts, assign=True)
        # A table that no checkpoint holds; on the meta device it has no values.
        llama.model.rotary_emb = type(llama.model.rotary_emb)(config).to(model.device)
        self.model, self.llama = model, llama.eval()
        self.ids = FixedTokenizer(words).prompt("")
        self.tokens = torch.empty(0)
        self._policy = VLAPolicy(model, FixedTokenizer(words))

    def act(self, observation: Observation) -> dict[str, float]:
        """Seconds a stage; "generate" is prefill and decode, as one call does both."""
        model, clock = self.model, [time.perf_counter()]

        def lap() -> None:
            wait(model.device)
            clock.append(time.perf_counter())

        pixels = torch.from_numpy(self._policy.preprocess(observation.images))[None].to(model.device, model.dtype)
        lap()
        hidden, _, _ = model.prompt(model.visual_tokens(pixels), [self.ids])
        lap()
        self.tokens = self.llama.generate(
            inputs_embeds=hidden,
            attention_mask=torch.ones(hidden.shape[:2], dtype=torch.long, device=model.device),
            max_new_tokens=model.config.action_tokens,
            min_new_tokens=model.config.action_tokens,
            do_sample=False,
        )
        self._policy.command(self.tokens.cpu().numpy())
        lap()
        seconds = [after - before for before, after in pairwise(clock)]
        return dict(zip(("preprocess", "vision", "generate"), seconds, strict=True))


def machine_speeds(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """{"gb_per_s", "gflop_per_s"}: the best of reading much memory, and of a large product, on this machine."""
    rows, size, count = 160 * (8 if device.type == "cuda" else 1) ** 2, 2048, 8192
    x, weight = torch.ones(rows, size, dtype=dtype, device=device), torch.ones(count, size, dtype=dtype, device=device)
    multiply = best_seconds(lambda: product(x, weight), device)
    return {
        "gb_per_s": round(read_rate(dtype, device) / 1e9, 1),
        "gflop_per_s": round(2 * rows * size * count / multiply / 1e9, 1),
    }


def count_work(model: VLA, words: int) -> dict[str, float]:
    """The least work of an answer: 1e9 operations of "vision" and "prefill", two a weight and token, and 1e9 bytes of
    weights read in "decode", in one pass.
    """
    config = model.config

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    pixels = torch.zeros(1, len(config.cameras), 3 * len(config.towers), config.image_size, config.image_size)
    visual = model.visual_tokens(pixels.to(model.device, model.dtype)).shape[1]
    layers = count(model.language_model.model.layers)
    head = config.action_bins * config.decoder.hidden_size
    return {
        "vision": 2e-9 * visual * (count(model.vision_backbone) + count(model.projector)),
        "prefill": 2e-9 * (visual + words) * layers,
        "decode": 1e-9 * (layers + head) * model.dtype.itemsize,
    }


def floor(work: dict[str, float], speeds: dict[str, float]) -> dict[str, float]:
    """Milliseconds of `count_work` at the machine's speeds.

    Weights that fit a processor's cache may be read faster than memory gives them: the floor is then no floor.
    """
    stages = {
        stage: 1e3 * amount / speeds["gb_per_s" if stage == "decode" else "gflop_per_s"]
        for stage, amount in work.items()
    }
    return {name: round(milliseconds, 3) for name, milliseconds in {**stages, "step": sum(stages.values())}.items()}


def achieved(work: dict[str, float], ours: dict[str, dict[str, float]], passes: float) -> dict[str, float]:
    """The work over the p50 of its stage: "gflop_per_s" of vision and prefill, "gb_per_s" of decode, which took so many
    passes.
    """
    seconds = {stage: ours[stage]["p50_ms"] / 1e3 for stage in work}
    return {
        "gflop_per_s": round((work["vision"] + work["prefill"]) / (seconds["vision"] + seconds["prefill"]), 1),
        "gb_per_s": round(passes * work["decode"] / seconds["decode"], 1),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _twin(model: VLA) -> VLA:
    """The same weights in modules of their own, which nobody has compiled."""
    with torch.device("meta"):
        twin = VLA(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval()


def noise_observation(model: VLA, seed: int) -> Observation:
    """Images of noise, of twice the size that the model wants, and proprioception all zero."""
    generator, side = np.random.default_rng(seed), 2 * model.config.image_size
    images = {camera: generator.integers(0, 256, (side, side, 3), np.uint8) for camera in model.config.cameras}
    return replace(make_example(model.config), images=images)


def _timed(act: Callable[[Observation], Any], observation: Observation) -> dict[str, float]:
    started = time.perf_counter()
    stages = act(observation)
    return {**stages, "step": time.perf_counter() - started}


def stage_summary(steps: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """steps: stage -> seconds. Returns "p50_ms", "p99_ms" and "min_ms" of every stage."""
    return {
        stage: {
            "p50_ms": round(float(np.percentile([step[stage] for step in steps], 50)) * 1e3, 3),
            "p99_ms": round(float(np.percentile([step[stage] for step in steps], 99)) * 1e3, 3),
            "min_ms": round(min(step[stage] for step in steps) * 1e3, 3),
        }
        for stage in steps[0]
    }
