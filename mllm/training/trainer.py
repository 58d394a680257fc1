"""The loop: draw, descend, average, report, and go on exactly where a kill left it."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mllm.checkpoint import replace_checkpoint
from mllm.errors import PolicyError
from mllm.training.config import TrainConfig
from mllm.training.data import (
    Batch,
    Frames,
    count_episodes,
    find_demonstrations,
    held_out,
    load_demonstrations,
    names_by_word,
)
from mllm.training.learner import Learner
from mllm.training.optimiser import make_optimisers, rate_share
from mllm.training.progress import Progress
from mllm.training.start import make_model
from mllm.training.state import load_state, read_facts, save_state

AHEAD = 3  # batches decoded before they are needed


class Trainer:
    """One run in its folder; `run` trains until the configured step and can be called again after any end.

    say: takes a line of progress.
    """

    def __init__(self, config: TrainConfig, runs: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = runs / config.name, say
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if config.batch % self.ranks:
            raise PolicyError(f"TrainConfig.batch is {config.batch}: it must be a multiple of {self.ranks} processes")
        if config.device == "cuda" and not torch.cuda.is_available():
            raise PolicyError("TrainConfig.device is 'cuda', and torch finds none here: choose 'cpu'")
        torch.set_num_threads(config.threads)
        self.device = torch.device(
            f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}" if config.device == "cuda" else config.device
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = read_facts(self.folder)
        config = self.config = config.resolved(facts["config"]["precision"] if facts else None)
        paths = find_demonstrations(config.data)
        say(f"reading {len(paths)} demonstrations")
        demos, self.digest = load_demonstrations(paths)
        # A folder that is named twice, or by a link, weighs twice and holds what it holds.
        once = {path.resolve(): demo for path, demo in zip(paths, demos, strict=True)}.values()
        self.learned = count_episodes(demo for demo in once if not held_out(demo, config.validation))
        if facts is not None:
            self._check_same(facts)
        model, self.tokenizer = make_model(config, demos, say)
        vla = model.config
        phases: list[str] = []
        kept = [demo for demo in demos if not held_out(demo, config.validation)]
        objects = names_by_word(demos, self.tokenizer)
        self.frames = Frames(kept, vla.cameras, vla.proprio, phases, list(objects.values()))
        out = [demo for demo in demos if held_out(demo, config.validation)]
        self.checked = Frames(out, vla.cameras, vla.proprio, phases, list(objects.values())) if out else None
        self.cumulated = np.cumsum(self.frames.weights(dict(config.phase_weights), dict(config.source_weights)))
        self.learner = Learner(model, config, len(phases), list(objects)).to(self.device)
        init_heads(self.learner, config.seed)
        if config.lora_rank:
            from mllm.training.lora import add_adapters

            add_adapters(self.learner.model, config.lora_rank)
        freeze(model, config.frozen)
        self.average = copy.deepcopy(self.learner).requires_grad_(False)
        self.optimisers = make_optimisers(self.learner, config)
        self.step = 0
        if facts is not None:
            self.step = load_state(self.folder, self.learner, self.average, self.optimisers)["step"]
            say(f"going on from step {self.step}")
        self.progress = Progress(self.folder, self.step, config, say) if self.rank == 0 else None
        trained = sum(p.numel() for p in self.learner.parameters() if p.requires_grad)
        say(f"{len(kept)} episodes, {len(self.frames)} frames to learn from, {len(out)} held out; {trained:,} weights")

    def _check_same(self, facts: dict[str, Any]) -> None:
        # A field that the run's own version did not have yet was at its default.
        defaults = TrainConfig(name=self.config.name, data=self.config.data)
        was, now = {**json.loads(defaults.to_json()), **facts["config"]}, json.loads(self.config.to_json())
        free = ("checkpoint_seconds", "log_seconds", "threads")
        changed = [key for key in now if key not in free and was.get(key) != now[key]]
        if changed:
            shown = "; ".join(f"{key} was {was.get(key)!r} and is {now[key]!r}" for key in changed)
            raise PolicyError(
                f"run '{self.config.name}' began otherwise: {shown}. Choose another name, and init from it"
            )
        if facts["data"] != self.digest:
            raise PolicyError(
                f"run '{self.config.name}' began with other demonstrations than {', '.join(self.config.data)} "
                "holds now: choose another name, and init from it"
            )

    def batch(self, step: int) -> tuple[Batch, np.random.Generator]:
        """This process's share of a step's samples, and the generator of their augmentation."""
        config = self.config
        drawn = np.random.default_rng([config.seed, step]).random(config.batch)
        index = np.minimum(np.searchsorted(self.cumulated, drawn, side="right"), len(self.frames) - 1)
        share = index[self.rank :: self.ranks]
        batch = self.frames.batch(share, self.learner.model.config.chunk, self.tokenizer)
        return batch, np.random.default_rng([config.seed, step, self.rank, 1])

    def _batches(self, until: int) -> Iterator[tuple[Batch, np.random.Generator]]:
        """Batches from the present step on, decoded in a thread of their own."""
        with ThreadPoolExecutor(1, "batches") as pool:
            waiting: list[Future[tuple[Batch, np.random.Generator]]] = []
            following = self.step
            while following < until or waiting:
                while following < until and len(waiting) < AHEAD:
                    waiting.append(pool.submit(self.batch, following))
                    following += 1
                yield waiting.pop(0).result()

    def run(self, until: int | None = None, stop: Callable[[], bool] = lambda: False) -> bool:
        """Trains up to step `until` (default: the configured one). Returns whether it got there; the state is saved.

        stop: asked after every step; where one of several processes is to stop, all do.
        """
        config = self.config
        until = config.steps if until is None else min(until, config.steps)
        self.learner.train()
        saved = time.monotonic()
        with parallel(self.learner, self.ranks, self.device) as forward:
            for batch, generator in self._batches(until):
                if self.progress is not None and self.progress.flops is None:
                    self.progress.flops = self._count_flops(batch) * self.ranks
                losses = self._descend(forward, batch, generator)
                self.step += 1
                if not torch.isfinite(losses["loss"]):
                    raise PolicyError(
                        f"the loss is {losses['loss'].item()} in step {self.step}: lower muon_rate and adamw_rate; the "
                        f"last state of run '{config.name}' is kept"
                    )
                stopping = any_of(stop(), self.ranks, self.device)
                if self.progress is not None:
                    self.progress.add(self.step, losses, rate_share(self.step, config))
                    if time.monotonic() - saved > config.checkpoint_seconds or self.step == until or stopping:
                        self.save()
                        saved = time.monotonic()
                if stopping:
                    break
        return self.step >= config.steps

    def _descend(self, forward: nn.Module, batch: Batch, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        config = self.config
        losses = forward(batch, generator)
        losses["loss"].backward()
        weights = [parameter for parameter in self.learner.parameters() if parameter.grad is not None]
        nn.utils.clip_grad_norm_(weights, config.clip)
        share = rate_share(self.step, config)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["full_rate"] * share
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.learner.parameters()), 1 - decay)
        return {name: value.detach() for name, value in losses.items()}

    def _count_flops(self, batch: Batch) -> int:
        """Of one step's forward and backward pass. A pass of its own: counting takes other kernels, which round
        otherwise.
        """
        with FlopCounterMode(display=False) as counter:
            self.learner(batch)["loss"].backward()
        self.learner.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    @torch.no_grad()
    def validate(self, samples: int = 512) -> dict[str, float]:
        """The averaged weights' losses on held-out frames, drawn alike every time; empty where none are held out."""
        if self.checked is None:
            return {}
        index = np.random.default_rng(0).choice(np.flatnonzero(self.checked.valid), samples)
        self.average.eval()
        sums: dict[str, float] = {}
        parts = np.array_split(index, max(1, samples // 64))
        for part in parts:
            batch = self.checked.batch(part, self.average.model.config.chunk, self.tokenizer)
            for name, value in self.average(batch).items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(part) / samples
        return sums

    def save(self) -> None:
        """Writes the averaged model as a checkpoint, the state, and the curves.

        The state comes after what it says is done: a run that a kill ends between the two writes both again.
        """
        assert self.progress is not None
        model = self.average.model
        if self.config.lora_rank:
            from mllm.training.lora import merged

            model = merged(model)
        replace_checkpoint(self.folder / "checkpoint", model, self.tokenizer)
        config = json.loads(self.config.to_json())
        facts = {"step": self.step, "config": config, "data": self.digest, "learned": self.learned}
        save_state(self.folder, self.learner, self.average, self.optimisers, facts)
        self.progress.checked(self.step, self.validate())


@contextmanager
def parallel(learner: nn.Module, ranks: int, device: torch.device) -> Iterator[nn.Module]:
    """What gives the losses: the learner, or where torchrun started several processes, it with averaged gradients."""
    if ranks == 1:
        yield learner
        return
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        ids = [device.index] if device.type == "cuda" else None
        yield nn.parallel.DistributedDataParallel(learner, device_ids=ids, find_unused_parameters=True)
    finally:
        torch.distributed.destroy_process_group()


def any_of(mine: bool, ranks: int, device: torch.device) -> bool:
    """Whether it is so in one of the processes or more; those that go on would wait for one that has stopped."""
    if ranks == 1:
        return mine
    answer = torch.tensor(float(mine), device=device)
    torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX)
    return bool(answer)


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Keeps the weights of modules as they are. Raises PolicyError: the model has no such module."""
    for name in names:
        try:
            model.get_submodule(name).requires_grad_(False)
        except AttributeError as error:
            known = ", ".join(child for child, _ in model.named_children())
            raise PolicyError(f"TrainConfig.frozen: the model has no module {name!r}; it has {known}") from error


@torch.no_grad()
def init_heads(learner: Learner, seed: int) -> None:
    """The auxiliary heads start at small random values by the seed."""
    generator = torch.Generator().manual_seed(seed + 1)
    for head in (learner.target_head, learner.phase_head):
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.02)
        head.bias.zero_()
