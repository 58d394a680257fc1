"""One picture of a quantised model: what every layer's weights and inputs lost, and in which format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quant.convert import Report
from sim.report_plots import plot_style

INK, SOFT, LINE = "#1c2127", "#5d6773", "#dfe3e8"
# Of the format: without a sign; integers; the rest by bits of its exponent.
UNSIGNED = "#c05a2b"
SIGNED = {1: "#8a8f98", 2: "#2f6fab", 3: "#2f7d5b", 4: "#8a5bb5", 5: "#b58a2b"}
_STYLE: dict[Any, Any] = {**plot_style(INK, SOFT, LINE), "font.size": 8, "axes.grid": True}


def draw_report(report: Report, path: Path) -> None:
    """Writes the picture (.png): layers downwards in the order in which they run, errors to the right."""
    import matplotlib
    from matplotlib.figure import Figure

    layers = report.layers
    weights = [(one.weight_nmse, _colour(max(one.formats, key=lambda name: one.formats[name])), "/".join(one.formats))
               for one in layers]  # fmt: skip
    inputs = [
        (one.input_nmse or 0.0, _colour(one.activation.format.name), one.activation.format.name)
        if one.activation
        else (0.0, LINE, "float")
        for one in layers
    ]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 1.2 + 0.19 * len(layers)), dpi=120, layout="constrained")
        for axes, bars, title in zip(
            figure.subplots(1, 2, sharey=True), (weights, inputs), ("weights", "inputs"), strict=True
        ):
            places = range(len(layers))
            axes.barh(places, [error for error, _, _ in bars], color=[colour for _, colour, _ in bars], height=0.7)
            for place, (error, _, name) in enumerate(bars):
                axes.text(error, place, f" {name}", va="center", fontsize=6, color=SOFT)
            axes.set_yticks(places, [one.name for one in layers])
            axes.set_ylim(len(layers) - 0.5, -0.5)
            axes.set_title(title, loc="left")
            axes.set_xlabel("squared error / square")
            axes.grid(axis="y", visible=False)
            axes.margins(x=0.25)
        figure.savefig(path)


def _colour(name: str) -> str:
    return UNSIGNED if name.startswith("u") else SIGNED[int(name[1])]
