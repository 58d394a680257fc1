"""Colours of pictures that are files, those of the report's page in daylight, and their style."""

from __future__ import annotations

from typing import Any

from sim.report_plots import plot_style

INK, SOFT, LINE = "#1c2127", "#5d6773", "#dfe3e8"
BLUE, ORANGE, GREEN, PURPLE, OCHRE, GREY = "#2f6fab", "#c05a2b", "#2f7d5b", "#8a5bb5", "#b58a2b", "#8a8f98"


def picture_style(size: int) -> dict[Any, Any]:
    """Settings of matplotlib; size: of type, in points."""
    return {**plot_style(INK, SOFT, LINE), "font.size": size}
