"""What choosing visual tokens costs beside what it saves: all arms by turns in one run, on the same observations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm.bench import device_name, noise_observation, stage_summary
from mllm.compress import METHODS, CompressConfig
from mllm.config import NAMED, check_choice, check_sizes
from mllm.contribution import information_contribution
from mllm.decoder import LayerState
from mllm.errors import PolicyError
from mllm.flops import eigen_flops, visual_flops
from mllm.policy import Observation
from mllm.selection import top
from mllm.sweep import draw_clips
from mllm.vla_policy import VLAPolicy, mini_ar_policy, mini_policy, random_policy

SHIPPED: dict[str, Callable[..., VLAPolicy]] = {"mini": mini_policy, "mini-ar": mini_ar_policy}
INSTRUCTION = "pick up the black bowl between the plate and the ramekin and place it on the plate"
# OpenVLA's visual tokens after a layer; the size at which the score is compared with the authors' call.
PUBLISHED = (256, 4096)


@dataclass(frozen=True)
class BenchCompressConfig:
    """model: one of `SHIPPED` with its own weights, or another of `mllm.config.NAMED` with random ones.

    methods, keep, layer, per_camera: see `mllm.compress.CompressConfig`; every method is measured with all tokens kept
        too.
    steps: answers measured of each arm.  demonstrations: folder of those whose frames are looked at; "" is noise.
    device: "cpu" or "cuda".  threads: of torch on the CPU.
    """

    model: str = "mini"
    methods: tuple[str, ...] = ("flashvla", "tokencarve", "fastv", "random")
    keep: int = 80
    layer: int = 2
    per_camera: bool = False
    steps: int = 50
    demonstrations: str = ""
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        check_choice(self, {"model": tuple({**SHIPPED, **NAMED}), "device": ("cpu", "cuda")})
        wrong = [method for method in self.methods if method not in METHODS[1:]]
        if wrong or not self.methods:
            raise PolicyError(
                f"BenchCompressConfig.methods is {self.methods}: name one or more of {', '.join(METHODS[1:])}"
            )
        check_sizes(self, {"keep": (1, 1 << 16), "layer": (1, 255), "steps": (1, 10_000), "threads": (1, 1024)})
        if self.device == "cuda" and not torch.cuda.is_available():
            raise PolicyError("BenchCompressConfig.device is 'cuda', and torch finds none here: choose 'cpu'")


@torch.inference_mode()
def measure_compression(config: BenchCompressConfig | None = None) -> dict[str, Any]:
    """Returns what JSON can hold.

    "arms": "uncompressed", and for every method "METHOD all" and "METHOD KEEP", with p50, p99 and least milliseconds of
    every stage, of the whole "step", and of the processor time that it took ("cpu", of all threads); and as shares of
    the uncompressed arm "step_share" and "cpu_share" (p50), "visual_flops", "step_flops" (mean; both without
    eigenvectors) and "eigen_flops". "select_share": p50 of choosing, of the uncompressed step.
    "exact": see `exactness`. "score": see `score_speed`.
    """
    config = config or BenchCompressConfig()
    torch.set_num_threads(config.threads)
    shipped = SHIPPED.get(config.model)
    policy = shipped(threads=None) if shipped else random_policy(config.model, 0, None)
    policy.model.to(config.device)
    policy = VLAPolicy(policy.model, policy.tokenizer)
    tokens = policy.model.vision_backbone.tokens
    arms = {"uncompressed": CompressConfig(keep=tokens)}
    for method in config.methods:
        chosen = CompressConfig(method, config.keep, config.layer, per_camera=config.per_camera)
        arms[f"{method} all"] = replace(chosen, keep=tokens)
        arms[f"{method} {config.keep}"] = chosen
    seen = _observations(config, policy)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    flops: dict[str, list[int]] = {name: [] for name in arms}
    for step, (instruction, frames) in enumerate(seen):
        for name, compress in arms.items():
            policy.compress, answer = compress, None
            # A prefill after a change sets up its cache anew; what is measured is the next.
            for observation in frames:
                episode = replace(policy.begin(instruction), answer=answer)
                started, worked = time.perf_counter(), time.process_time()
                done = policy.act_batch([episode], [observation])[0]
                answer = episode.answer
                elapsed, work = time.perf_counter() - started, time.process_time() - worked
            if step:
                times[name].append({**done.timing, "step": elapsed, "cpu": work})
                flops[name].append(done.flags["flops"])
    whole, vision_whole = sum(flops["uncompressed"]), visual_flops(policy.config.decoder, tokens)
    cameras = len(policy.config.cameras)
    summaries = {name: stage_summary(steps) for name, steps in times.items()}
    base, work = (summaries["uncompressed"][name]["p50_ms"] for name in ("step", "cpu"))
    result: dict[str, Any] = {}
    for name, compress in arms.items():
        select = summaries[name].get("select", {}).get("p50_ms", 0.0)
        result[name] = {
            **summaries[name],
            "step_share": round(summaries[name]["step"]["p50_ms"] / base, 3),
            "cpu_share": round(summaries[name]["cpu"]["p50_ms"] / work, 3),
            "select_share": round(select / base, 4),
            "visual_flops": round(visual_flops(policy.config.decoder, tokens, compress) / vision_whole, 4),
            "step_flops": round(sum(flops[name]) / whole, 4),
            "eigen_flops": round(config.steps * eigen_flops(tokens, cameras, compress) / whole, 4),
        }
    return {
        "model": config.model,
        "visual_tokens": tokens,
        "steps": config.steps,
        "arms": result,
        "exact": exactness(policy, seen[1:], config.layer),
        "score": score_speed(),
        "machine": {"device": device_name(torch.device(config.device)), "threads": config.threads},
        "torch": torch.__version__,
    }


def _observations(config: BenchCompressConfig, policy: VLAPolicy) -> list[tuple[str, list[Observation]]]:
    """Instructions and two frames, one behind the other: once to warm up, and once for every step."""
    count = config.steps + 1
    if not config.demonstrations:
        noise = [noise_observation(policy.model, number) for number in range(count + 1)]
        return [(INSTRUCTION, list(pair)) for pair in pairwise(noise)]
    clips = draw_clips(Path(config.demonstrations), count, 2)
    frames = [(clip.instruction, list(clip.observations())) for clip in clips]
    return [(instruction, [seen[0], seen[-1]]) for instruction, seen in frames]  # a clip may have a single frame


def exactness(policy: VLAPolicy, seen: Sequence[tuple[str, list[Observation]]], layer: int) -> dict[str, Any]:
    """Whether the highest scores after `layer` are those of a full decomposition in float64.

    "observations": looked at.  "keeps": numbers of tokens kept, eighths of all.  "equal": observations whose kept sets
    are equal at every one of them.  "tokens": that differ, of all sets together.
    """
    states: list[Tensor] = []
    count = policy.model.vision_backbone.tokens

    def note(state: LayerState) -> None:
        if state.layer == layer:
            states.append(state.hidden[0, 1 : count + 1].cpu())

    watched = VLAPolicy(policy.model, policy.tokenizer, hook=note)
    for instruction, frames in seen:
        watched.act_batch([watched.begin(instruction)], [frames[-1]])
    keeps, equal, tokens = [count * part // 8 for part in range(1, 8)], 0, 0
    for state in states:
        ours, exact = information_contribution(state)[None], _published(state.double())[None]
        apart = [len(set(top(ours, keep)[0].tolist()) - set(top(exact, keep)[0].tolist())) for keep in keeps]
        equal, tokens = equal + (not any(apart)), tokens + sum(apart)
    return {"observations": len(states), "keeps": keeps, "equal": equal, "tokens": tokens}


def score_speed(size: tuple[int, int] = PUBLISHED, repeats: int = 5) -> dict[str, float]:
    """Least milliseconds of processor time of our score and of the authors' call, a full decomposition in float32, on
    one thread, of tokens of `size`.
    """
    threads, ours, theirs = torch.get_num_threads(), [], []
    torch.set_num_threads(1)
    try:
        for seed in range(repeats):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(size, generator=generator) + torch.randn(1, size[1], generator=generator)
            ours.append(_seconds(information_contribution, x))
            theirs.append(_seconds(_published, x))
    finally:
        torch.set_num_threads(threads)
    return {
        "ours_ms": round(1e3 * min(ours), 3),
        "published_ms": round(1e3 * min(theirs), 3),
        "times_as_fast": round(min(theirs) / min(ours), 1),
    }


def _published(x: Tensor) -> Tensor:
    """The score as TokenCarve's code computes it."""
    left, sizes, _ = torch.linalg.svd(x, full_matrices=True)
    return (left[:, : len(sizes)] * sizes).abs().sum(1)


def _seconds(score: Callable[[Tensor], Tensor], tokens: Tensor) -> float:
    started = time.process_time()
    score(tokens)
    return time.process_time() - started
