"""The pictures of a report, as SVG that takes the page's own colours."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sim.results import EpisodeResult

# Drawn in these, then replaced by what the page calls them, so that one picture suits light and dark.
_COLOURS = {"#010203": "currentColor", "#010204": "var(--soft)", "#010205": "var(--line)", "#010206": "var(--good)",
            "#010207": "var(--bad)", "#010208": "var(--mark)"}  # fmt: skip
INK, SOFT, LINE, GOOD, BAD, MARK = _COLOURS
LABEL, PARETO = 8, (9.6, 4.2)  # points of type; inches of the picture


def plot_style(ink: str, soft: str, line: str) -> dict[Any, Any]:
    """Settings of matplotlib that all pictures share, in these colours: of words, of labels, and of lines."""
    return {
        "font.family": "sans-serif",
        "text.color": ink,
        "axes.edgecolor": line,
        "axes.labelcolor": soft,
        "xtick.color": soft,
        "ytick.color": soft,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": line,
        "legend.frameon": False,
    }


_STYLE: dict[Any, Any] = {
    **plot_style(INK, SOFT, LINE),
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "flashvla",  # the same run gives the same page
}


@dataclass(frozen=True)
class Point:
    """One variant in a picture of success against cost. interval: of the rate.  cost: in the picture's unit."""

    name: str
    rate: float
    interval: tuple[float, float]
    cost: float


def _svg(draw: Any, width: float = 5.4, height: float = 3.0) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]  # without the XML prologue and its address of a document type
    for drawn, wanted in _COLOURS.items():
        text = text.replace(drawn, wanted)
    return text


def steps_plot(episodes: Sequence[EpisodeResult]) -> str:
    """How long successes take, and where failures end."""
    steps = {outcome: [e.steps for e in episodes if e.outcome == outcome] for outcome in ("success", "failure")}

    def draw(axes: Any) -> None:
        highest = max((max(values) for values in steps.values() if values), default=1)
        bins = np.linspace(0, highest, 31)
        shown = [(outcome, values) for outcome, values in steps.items() if values]
        axes.hist(
            [values for _, values in shown],
            bins=bins,
            stacked=True,
            color=[{"success": GOOD, "failure": BAD}[outcome] for outcome, _ in shown],
            label=[outcome for outcome, _ in shown],
        )
        axes.set(xlabel="control steps", ylabel="episodes")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y")
        if shown:
            axes.legend()

    return _svg(draw)


def latency_plot(stages: Mapping[str, np.ndarray]) -> str:
    """Which share of the steps took at most how long, for each stage; stages: name -> s of all steps, no NaN."""
    import matplotlib

    def draw(axes: Any) -> None:
        colours = [MARK, GOOD, BAD, SOFT, INK]
        for number, (stage, seconds) in enumerate(stages.items()):
            # 512 points look like all of them, in a page that stays small.
            shares = np.linspace(0, 1, 512)
            axes.plot(
                np.quantile(seconds, shares) * 1e3,
                shares * 100,
                label=stage,
                color=colours[number % len(colours)],
                linestyle=("-", "--", ":")[number // len(colours) % 3],
                linewidth=1.6,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.set(xlabel="milliseconds", ylabel="steps, %", ylim=(0, 101))
        # Waiting can be as short as it likes; below a hundredth of a millisecond nothing is of interest.
        axes.set_xlim(left=max(axes.get_xlim()[0], 0.01))
        axes.grid(axis="both")
        axes.legend(fontsize=9)

    return _svg(draw)


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in one of success and cost without being worse in the other, the cheapest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.rate)):
        if not best or point.rate > best[-1].rate:
            best.append(point)
    return best


def short_names(names: Sequence[str]) -> list[str]:
    """Of variants, such as "flashvla-16-layer=1-off", without the settings that no two of them need to differ."""
    parts = [re.split("-(?=[a-z])", name) for name in names]
    for setting in sorted({part.split("=")[0] for each in parts for part in each if "=" in part}):
        fewer = [[part for part in each if not part.startswith(f"{setting}=")] for each in parts]
        if len({tuple(each) for each in fewer}) == len(parts):
            parts = fewer
    return ["-".join(each) for each in parts]


def pareto_plot(points: Sequence[Point], cost: str) -> str:
    """Success against cost, one point a variant, and a line through the front. cost: the axis, with its unit."""

    def draw(axes: Any) -> None:
        best = front(points)
        axes.step(
            [point.cost for point in best],
            [100 * point.rate for point in best],
            where="post",
            color=GOOD,
            linewidth=1.2,
            linestyle="--",
        )
        for point in points:
            low, high = point.interval
            axes.plot([point.cost] * 2, [100 * low, 100 * high], color=SOFT, linewidth=0.8)
            axes.plot([point.cost], [100 * point.rate], "o", color=GOOD if point in best else MARK)
        axes.set(xlabel=cost, ylabel="success, %")
        axes.grid(axis="both")
        axes.margins(x=0.12, y=0.08)
        places = [_place(axes, point.cost, 100 * point.rate) for point in points]
        names = short_names([point.name for point in points])
        for point, name, offset in zip(points, names, label_offsets(names, places), strict=True):
            axes.annotate(
                name,
                (point.cost, 100 * point.rate),
                xytext=offset,
                textcoords="offset points",
                fontsize=LABEL,
                arrowprops={"arrowstyle": "-", "color": LINE, "shrinkA": 0, "shrinkB": 3} if offset[0] > 8 else None,
            )

    return _svg(draw, *PARETO)


def _place(axes: Any, x: float, y: float) -> tuple[float, float]:
    """About where a point lies in the picture, in points of type from its lower left."""
    limits = zip((x, y), (axes.get_xlim(), axes.get_ylim()), PARETO, strict=True)
    across, up = (72 * size * (value - low) / (high - low) for value, (low, high), size in limits)
    return across, up


def label_offsets(names: Sequence[str], places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where each name stands from its point so that it hides no other: the nearest free place, one after the other.

    places: of the points, in points of type; offsets are too.
    """
    taken = [(x - 4, x + 4, y - 4, y + 4) for x, y in places]
    choices = sorted(
        ((right, up) for right in (6.0, 24.0, 60.0) for up in np.arange(-98.0, 99.0, 10.0)),
        key=lambda offset: offset[0] + abs(offset[1] + 2),
    )
    found = []
    for name, (x, y) in zip(names, places, strict=True):
        for right, up in choices:
            left, bottom = x + right, y + up
            box = (left, left + 0.62 * LABEL * len(name), bottom, bottom + LABEL)
            if not any(a < box[1] and box[0] < b and c < box[3] and box[2] < d for a, b, c, d in taken):
                break
        taken.append(box)
        found.append((right, up))
    return found
