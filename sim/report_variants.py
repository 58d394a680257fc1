"""The section of a report that sets the variants of a run, such as a sweep's arms, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from sim.report_plots import Point, pareto_plot
from sim.report_tables import rate_cells, table
from sim.results import EpisodeResult
from sim.standings import Standing, standings
from sim.statistics import Change, percent


def variants_section(episodes: Mapping[str, Sequence[EpisodeResult]]) -> str:
    """Tables of what each variant reaches and costs, pictures of the one against the other, and paired differences from
    the reference where the run has it.  episodes: by variant.
    """
    found = standings(episodes)
    return f"<h2>Variants</h2>{_reached(found, episodes)}{_pictures(found)}{_differences(found)}"


def _reached(found: Sequence[Standing], episodes: Mapping[str, Sequence[EpisodeResult]]) -> str:
    rows = []
    for one in found:
        latency = [f"{one.latency[name] * 1e3:.1f}" if one.latency else "" for name in ("mean", "p50", "p99")]
        flops = ["" if value is None else f"{value / 1e9:.3g}" for value in (one.flops, one.visual_flops)]
        reused = percent(one.reused) if one.reused else ""
        memory = "" if one.weight_bytes is None else f"{one.weight_bytes / 1e6:.3g}"
        rows.append([_named(one), *rate_cells(episodes[one.variant]), *latency, reused, *flops, memory])
    heads = ["variant", "", "n", "solved", "success", "95 % interval", "errors", "mean ms", "p50 ms", "p99 ms"]
    said = (
        "Milliseconds are the policy's, and GFLOPs the model's, in a control step, over all of them: also those in "
        "which it went on with a plan or reused an action. Visual: of visual tokens in the decoder alone. "
        "MB: of the model's weights."
    )
    made = table([*heads, "reused", "GFLOPs", "visual", "MB"], rows, 2)
    return f'{made}<p class="soft">{said}</p>'


def _pictures(found: Sequence[Standing]) -> str:
    costs = {
        "policy, mean ms a step": [one.latency.get("mean", 0.0) * 1e3 for one in found],
        "GFLOPs a step, mean": [(one.flops or 0.0) / 1e9 for one in found],
    }
    figures = []
    for name, values in costs.items():
        points = [
            Point(one.variant or "unnamed", one.rate, one.interval, value)
            for one, value in zip(found, values, strict=True)
            if one.rate is not None and value
        ]
        if points:
            figures.append(f"<figure>{pareto_plot(points, name)}</figure>")
    said = (
        "Lines are 95 % intervals (Wilson); the dashed one joins the variants that none beats in both. Names are "
        "without the settings that no two variants need to differ."
    )
    return f'{"".join(figures)}<p class="soft">{said}</p>' if figures else ""


def _differences(found: Sequence[Standing]) -> str:
    rows = [
        [
            _named(one),
            str(one.against.n),
            _change(one.against.success),
            f"{len(one.against.only_b)} / {len(one.against.only_a)}",
            f"{one.against.p_value:.3g}",
            _change(one.against.relative_latency),
            _change(one.against.relative_flops),
            _change(one.against.relative_visual_flops),
        ]
        for one in found
        if one.against is not None
    ]
    if not rows:
        return ""
    heads = [
        "variant",
        "pairs",
        "success, points",
        "won / lost",
        "McNemar p",
        "mean latency, %",
        "FLOPs, %",
        "visual, %",
    ]
    notes = sorted({note for one in found if one.against for note in one.against.notes})
    said = (
        f"Differences from {_named(found[0])} on the same episodes, with 95 % intervals by paired bootstrap over them. "
        "Each p is of one comparison: of many, some are small by chance."
    )
    apart = f" Latency may not be comparable: {escape('; '.join(notes))}." if notes else ""
    return f'<h3>Paired differences</h3>{table(heads, rows, 1)}<p class="soft">{said}{apart}</p>'


def _named(one: Standing) -> str:
    return escape(one.variant or "unnamed")


def _change(change: Change | None) -> str:
    """In hundredths, with its interval."""
    if change is None:
        return ""
    low, high = change.interval
    return f"{100 * change.value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
