"""What a run says while it goes on: lines, a JSON line a report, TensorBoard, and a picture of the curves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mllm.bench import machine_speeds
from mllm.training.config import TrainConfig

FILE = "metrics.jsonl"


class Progress:
    """Averages losses between reports. flops: of one step, filled in by the trainer once it has counted them."""

    def __init__(self, folder: Path, step: int, config: TrainConfig, say: Callable[[str], None]) -> None:
        self.folder, self.config, self.say = folder, config, say
        self.flops: int | None = None
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._began = time.monotonic()
        # The best rate of this machine in the precision of the run, beside which a rate means something.
        self._peak = machine_speeds(config.dtype, torch.device(config.device))["gflop_per_s"]
        self._forget_after(step)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board: SummaryWriter | None = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        except ImportError:
            self._board = None
            say("no TensorBoard curves: pip install tensorboard")

    def _forget_after(self, step: int) -> None:
        """Drops reports of steps that a kill undid."""
        path = self.folder / FILE
        if path.is_file():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))

    def add(self, step: int, losses: dict[str, Tensor], share: float) -> None:
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        self._count += 1
        seconds = time.monotonic() - self._began
        if seconds < self.config.log_seconds and step < self.config.steps:
            return
        means = {name: value.item() / self._count for name, value in self._sums.items()}
        rate = self._count * self.config.batch / seconds
        gflop = (self.flops or 0) * self._count / seconds / 1e9
        left = (self.config.steps - step) * seconds / self._count
        shown = " ".join(f"{name} {value:.4f}" for name, value in means.items())
        self.say(
            f"step {step}/{self.config.steps} {shown} | rate {share:.2f} | {rate:.1f} samples/s, {gflop:.0f} GFLOP/s "
            f"({100 * gflop / self._peak:.0f} % of {self._peak:.0f}) | {left / 60:.0f} min left"
        )
        self._write(step, {f"train/{name}": value for name, value in means.items()} | {"samples_per_s": rate})
        self._sums, self._count, self._began = {}, 0, time.monotonic()

    def checked(self, step: int, losses: dict[str, float]) -> None:
        """Reports losses on held-out episodes, and draws the curves anew."""
        if losses:
            self.say(f"step {step} held out: " + " ".join(f"{name} {value:.4f}" for name, value in losses.items()))
            self._write(step, {f"held_out/{name}": value for name, value in losses.items()})
        draw_curves(self.folder)
        self._began = time.monotonic() if not self._count else self._began

    def _write(self, step: int, values: dict[str, float]) -> None:
        with (self.folder / FILE).open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()


def draw_curves(folder: Path) -> None:
    """`curves.png` of what `metrics.jsonl` holds."""
    from matplotlib.figure import Figure

    path = folder / FILE
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    names = sorted({name.split("/")[1] for row in rows for name in row if "/" in name} - {"loss"})
    if not names:
        return
    rows_of_plots = -(-len(names) // 3)
    figure = Figure(figsize=(11, 3 * rows_of_plots), layout="constrained")
    plots = figure.subplots(rows_of_plots, 3, squeeze=False).flat
    for empty in plots[len(names) :]:
        empty.set_axis_off()
    for axes, name in zip(plots, names, strict=False):
        for kind in ("train", "held_out"):
            points = [(row["step"], row[f"{kind}/{name}"]) for row in rows if f"{kind}/{name}" in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=kind.replace("_", " "), linewidth=1.2)
        axes.set(title=name.replace("_", " "), xlabel="step", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(folder / "curves.png", dpi=110)
