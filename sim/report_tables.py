"""Tables of a report, as HTML."""

from __future__ import annotations

from collections.abc import Sequence

from sim.results import EpisodeResult
from sim.statistics import percent, wilson


def outcome_counts(episodes: Sequence[EpisodeResult]) -> tuple[int, int, int]:
    """(successes, successes and failures, errors)."""
    outcomes = [episode.outcome for episode in episodes]
    successes, errors = outcomes.count("success"), outcomes.count("error")
    return successes, len(outcomes) - errors, errors


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], numeric: int, total: bool = False) -> str:
    """A table of HTML cells; columns from `numeric` on are right-aligned, and the last row may be a total."""
    classes = ["" if column < numeric else ' class="n"' for column in range(len(heads))]
    head = "".join(f"<th{kind}>{text}</th>" for kind, text in zip(classes, heads, strict=True))
    body = "".join(
        f"<tr{' class=total' if total and number == len(rows) - 1 else ''}>"
        + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(classes, row, strict=True))
        + "</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def bar(successes: int, n: int) -> str:
    if not n:
        return ""
    low, high = (100 * bound for bound in wilson(successes, n))
    return (
        f'<div class="bar"><i style="width:{100 * successes / n:.1f}%"></i>'
        f'<u style="left:{low:.1f}%;width:{high - low:.1f}%"></u></div>'
    )


def rate_cells(episodes: Sequence[EpisodeResult]) -> list[str]:
    successes, n, errors = outcome_counts(episodes)
    low, high = wilson(successes, n)
    rate = [percent(successes / n), f"{100 * low:.0f} - {100 * high:.0f} %"] if n else ["", ""]
    return [bar(successes, n), str(n), str(successes), *rate, str(errors or "")]
