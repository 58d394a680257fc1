"""Where commands print their tables."""

from __future__ import annotations

from rich.console import Console

WIDTH = 165  # columns, where no terminal says otherwise: in files and pipes nothing is cut


def table_console(json_output: bool) -> Console:
    """On stderr where stdout is for JSON."""
    console = Console(stderr=json_output)
    return console if console.is_terminal else Console(stderr=json_output, width=WIDTH)
