"""One picture of a quantised model: what every layer's weights and inputs lost, and in which format."""

from __future__ import annotations

from pathlib import Path

from flashvla_ros.palette import BLUE, GREEN, GREY, LINE, OCHRE, ORANGE, PURPLE, SOFT, picture_style
from quant.convert import Report

# Of the format: without a sign; integers; the rest by bits of its exponent.
UNSIGNED = ORANGE
SIGNED = {1: GREY, 2: BLUE, 3: GREEN, 4: PURPLE, 5: OCHRE}


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
    with matplotlib.rc_context({**picture_style(8), "axes.grid": True}):
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
