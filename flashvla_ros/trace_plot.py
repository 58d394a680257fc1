"""One picture of an episode: what was commanded, what reuse went by, and how long each step took."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flashvla_ros.bag_trace import BagTrace
from flashvla_ros.errors import ConfigurationError
from flashvla_ros.palette import BLUE, GREEN, INK, ORANGE, PURPLE, SOFT, picture_style
from mllm.reuse import Reason

FORMATS = (".png", ".svg", ".pdf")
REUSED, COMPUTED = ORANGE, BLUE
AXES = {"x": INK, "y": GREEN, "z": PURPLE}


def borders(times: np.ndarray) -> np.ndarray:
    """(T + 1,) s: where each of T steps begins, and where the last ends, which is as long as a step usually is."""
    return np.append(times, times[-1] + (np.median(np.diff(times)) if len(times) > 1 else 1.0))


def spans(marked: np.ndarray, times: np.ndarray) -> list[tuple[float, float]]:
    """Where runs of marked steps begin, and where the step after each begins, in s.

    marked: (T,) bool.  times: (T,) s, rising.
    """
    ends = borders(times)
    turns = np.flatnonzero(np.diff(np.concatenate(([False], marked, [False])).astype(int)))
    return [(float(ends[first]), float(ends[last])) for first, last in turns.reshape(-1, 2)]


def summary(trace: BagTrace) -> str:
    """How long the policy took, and how often it reused."""
    steps, reused = len(trace.times), int(trace.reused.sum())
    known = trace.latency[np.isfinite(trace.latency)]
    took = "latency unknown"
    if len(known):
        took = f"mean {known.mean():.1f} ms, p50 {np.median(known):.1f}, p99 {np.percentile(known, 99):.1f}"
    return f"{steps} steps, {reused} reused ({reused / steps:.0%}); policy: {took}"


def draw_trace(trace: BagTrace, path: Path) -> None:
    """Writes the picture. Panels of what the bag says nothing about are left out.

    Raises ConfigurationError: the file's format is not one of `FORMATS`.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigurationError(f"a picture cannot be written to '{path}': name it *{', *'.join(FORMATS)}")
    import matplotlib
    from matplotlib.figure import Figure

    rows: list[tuple[float, Callable[[Any, BagTrace], None]]] = [(1.5, _linear), (1.5, _angular), (0.8, _gripper)]
    if any(trace.reasons):
        rows.append((0.5 + 0.22 * len(_occurring(trace)), _decisions))
    for values, panel in ((trace.angle, _angle), (trace.overlap, _overlap), (trace.surprise, _surprise)):
        if np.isfinite(values).any():
            rows.append((1.1, panel))
    rows.append((1.3, _latency))
    heights = [height for height, _ in rows]
    with matplotlib.rc_context({**picture_style(9), "axes.grid": True}):
        figure = Figure(figsize=(10, sum(heights) + 0.3 * len(rows) + 0.6), dpi=120, layout="constrained")
        all_axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (_, draw) in zip(all_axes, rows, strict=True):
            for begin, end in spans(trace.reused, trace.times):
                axes.axvspan(begin, end, color=REUSED, alpha=0.15, linewidth=0)
            draw(axes, trace)
        all_axes[-1].set_xlabel("s")
        all_axes[-1].set_xlim(0, borders(trace.times)[-1])
        headline = ": ".join(part for part in (trace.instruction, trace.outcome) if part) or "episode"
        all_axes[0].set_title(f"{headline}\n", loc="left", fontsize=12)
        all_axes[0].text(0, 1.04, f"{summary(trace)}; reused steps shaded", color=SOFT, transform=all_axes[0].transAxes)
        figure.align_ylabels()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _three(axes: Any, trace: BagTrace, values: np.ndarray, label: str) -> None:
    for (name, colour), numbers in zip(AXES.items(), values.T, strict=True):
        axes.stairs(numbers, borders(trace.times), baseline=None, color=colour, linewidth=1.3, label=name)
    axes.set_ylabel(label)


def _linear(axes: Any, trace: BagTrace) -> None:
    _three(axes, trace, trace.linear, "linear\nm/s")
    if trace.corrected.any():
        places = trace.times[trace.corrected]
        axes.plot(places, np.zeros(len(places)), "x", color=INK, label="clamped or\nrefused")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=1.2)


def _angular(axes: Any, trace: BagTrace) -> None:
    _three(axes, trace, trace.angular, "angular\nrad/s")


def _gripper(axes: Any, trace: BagTrace) -> None:
    axes.stairs(trace.opening * 1e3, borders(trace.times), baseline=None, color=INK, linewidth=1.3)
    axes.set_ylabel("gripper\nmm")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def _occurring(trace: BagTrace) -> list[str]:
    """The reasons of this episode, the rule's first ones last, so that "reused" stands on top."""
    known = [reason.value for reason in Reason]
    return [name for name in known if name in trace.reasons] + sorted(set(trace.reasons) - {"", *known})


def _decisions(axes: Any, trace: BagTrace) -> None:
    names = _occurring(trace)
    for place, name in enumerate(names):
        times = [time for time, reason in zip(trace.times, trace.reasons, strict=True) if reason == name]
        colour = REUSED if name == Reason.REUSED.value else COMPUTED
        axes.plot(times, [place] * len(times), "o", markersize=4, color=colour, clip_on=False)
    words = [name.removeprefix("computed-").replace("-", " ") for name in names]
    axes.set_yticks(range(len(names)), words, fontsize=8)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_ylabel("why")


def _looks(axes: Any, trace: BagTrace, values: np.ndarray, label: str) -> None:
    known = np.isfinite(values)
    axes.plot(trace.times[known], values[known], color=SOFT, linewidth=0.8)
    for chosen, colour in ((known & ~trace.reused, COMPUTED), (known & trace.reused, REUSED)):
        if chosen.any():
            axes.plot(trace.times[chosen], values[chosen], "o", markersize=4, color=colour, clip_on=False)
    axes.set_ylabel(label)


def _angle(axes: Any, trace: BagTrace) -> None:
    _looks(axes, trace, trace.angle, "angle\ndegrees")
    axes.set_ylim(bottom=0)


def _overlap(axes: Any, trace: BagTrace) -> None:
    _looks(axes, trace, trace.overlap * 100, "overlap\n%")
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 105)


def _surprise(axes: Any, trace: BagTrace) -> None:
    finite = np.where(np.isinf(trace.surprise), np.nan, trace.surprise)
    _looks(axes, trace, finite, "surprise\ngrey levels")
    axes.set_ylim(bottom=0)


def _latency(axes: Any, trace: BagTrace) -> None:
    for chosen, colour, label in ((~trace.reused, COMPUTED, "computed"), (trace.reused, REUSED, "reused")):
        if chosen.any():
            times, took = trace.times[chosen], trace.latency[chosen]
            axes.vlines(times, 0, took, color=colour, linewidth=1.2)
            axes.plot(times, took, "o", markersize=3, color=colour, label=label, clip_on=False)
    axes.set_ylabel("latency\nms")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handletextpad=0.2)
