"""A run as one self-contained HTML page: nothing in it asks the network for anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from sim.report_films import films
from sim.report_plots import latency_plot, steps_plot
from sim.report_style import STYLE
from sim.report_tables import outcome_counts, rate_cells, table
from sim.report_variants import variants_section
from sim.results import EpisodeResult, RunFile
from sim.statistics import percent, pooled_stages, wilson

_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"  # of the page's content
_MIN_MS = 1e-3  # a stage that never took a microsecond is not worth a line in a picture


def write_report(run: Path | str, out: Path | str, videos: int = 24) -> None:
    """Writes the page of the run's file to `out`.

    videos: most videos of failures and errors in the page; all of them stay in the run.
    Raises ConfigurationError: not a run.
    """
    with RunFile(run) as file:
        configurations = file.configurations()
        episodes = {variant: list(file.episodes(variant, videos=True)) for variant in configurations}
    page = make_page(Path(run).name, configurations, episodes, videos)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(page, encoding="utf-8")


def make_page(
    name: str,
    configurations: Mapping[str, Mapping[str, Any]],
    episodes: Mapping[str, Sequence[EpisodeResult]],
    videos: int = 24,
) -> str:
    """The page. configurations, episodes: by variant, as `RunFile` has them."""
    several = len(configurations) > 1
    body = [_head(name, configurations, [episode for part in episodes.values() for episode in part], several)]
    if several:
        body.append(variants_section(episodes))
    for variant, configuration in configurations.items():
        if several:
            body.append(f"<h2>{escape(variant or 'unnamed variant')}</h2>")
        body.append(_variant(configuration, episodes[variant], videos))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(name)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{''.join(body)}\n</main>\n</body>\n</html>\n"
    )


def _head(
    name: str, configurations: Mapping[str, Mapping[str, Any]], episodes: Sequence[EpisodeResult], several: bool
) -> str:
    policies = sorted({str(configuration["policy"]["name"]) for configuration in configurations.values()})
    days = [day for episode in episodes for day in (episode.started[:10], episode.finished[:10])]
    when = f", {min(days)} to {max(days)}" if days else ""
    title = f"<h1>{escape(', '.join(policies))} on LIBERO</h1>"
    title += f'<p class="soft">{escape(name)}: {len(episodes)} episodes{when}</p>'
    return title if several else title + _tiles(episodes)


def _tiles(episodes: Sequence[EpisodeResult]) -> str:
    successes, n, errors = outcome_counts(episodes)
    low, high = wilson(successes, n)
    policy = pooled_stages(episodes).get("policy")
    steps = [episode.steps for episode in episodes if episode.outcome == "success"]
    tiles = [
        (percent(successes / n) if n else "-", "success"),
        (f"{100 * low:.0f} - {100 * high:.0f} %", "95 % interval (Wilson)"),
        (f"{successes} of {n}", "episodes solved"),
        (str(errors), "errors, not counted"),
    ]
    if steps:
        tiles.append((f"{np.median(steps):.0f}", "steps to success, median"))
    if policy:  # the median of a policy that acts in chunks says nothing
        tiles.append((f"{policy['mean'] * 1e3:.1f} ms", "policy a step, mean"))
    boxes = "".join(f'<div class="tile"><b>{value}</b><span>{text}</span></div>' for value, text in tiles)
    return f'<div class="tiles">{boxes}</div>'


def _grouped(episodes: Sequence[EpisodeResult], by: Callable[[EpisodeResult], Any]) -> dict[Any, list[EpisodeResult]]:
    groups: dict[Any, list[EpisodeResult]] = {}
    for episode in episodes:
        groups.setdefault(by(episode), []).append(episode)
    return groups


def _variant(configuration: Mapping[str, Any], episodes: Sequence[EpisodeResult], videos: int) -> str:
    return "".join(
        [
            _success(episodes),
            _states(episodes),
            _pictures(episodes),
            _latency(episodes),
            _flags(episodes),
            films(episodes, videos),
            _errors(episodes),
            _provenance(configuration, episodes),
        ]
    )


def _success(episodes: Sequence[EpisodeResult]) -> str:
    tables = []
    suites = _grouped(episodes, lambda episode: episode.key.suite)
    for suite, part in suites.items():
        tasks = _grouped(part, lambda episode: (episode.key.task, episode.language))
        rows = [[str(task), escape(language), *rate_cells(own)] for (task, language), own in tasks.items()]
        rows.append(["", "all", *rate_cells(part)])
        heads = ["task", escape(suite), "", "n", "solved", "success", "95 % interval", "errors"]
        tables.append(table(heads, rows, 3, total=True))
    return f"<h3>Success</h3>{''.join(tables)}"


def _states(episodes: Sequence[EpisodeResult]) -> str:
    rows = []
    for (suite, task), part in _grouped(episodes, lambda episode: (episode.key.suite, episode.key.task)).items():
        cells = "".join(
            f'<i class="{episode.outcome}" title="{escape(str(episode.key))}: {episode.outcome} after {episode.steps} '
            'steps"></i>'
            for episode in part
        )
        rows.append(f'<div>{escape(suite)} {task}</div><div class="cells">{cells}</div>')
    key = "".join(f'<i class="{outcome}"></i>{outcome}' for outcome in ("success", "failure", "error"))
    return f'<h3>Episode by episode</h3><div class="grid">{"".join(rows)}</div><div class="key">{key}</div>'


def _pictures(episodes: Sequence[EpisodeResult]) -> str:
    if not any(episode.steps for episode in episodes):
        return ""
    stages: dict[str, np.ndarray] = {}
    for name in pooled_stages(episodes):
        parts = [episode.timing[name] for episode in episodes if name in episode.timing]
        seconds = np.concatenate(parts)
        seconds = seconds[seconds > 0]  # also drops NaN
        if seconds.size and seconds.max() * 1e3 > _MIN_MS:
            stages[name] = seconds
    figures = [(steps_plot(episodes), "How long episodes took; failures end at the suite's limit.")]
    if stages:
        figures.append(
            (latency_plot(stages), "Steps that took at most this long, for each stage; time on a log scale.")
        )
    drawn = "".join(f"<figure>{svg}<figcaption>{text}</figcaption></figure>" for svg, text in figures)
    return f'<h3>Steps and latency</h3><div class="plots">{drawn}</div>'


def _latency(episodes: Sequence[EpisodeResult]) -> str:
    rows = [
        [escape(stage), *(f"{summary[name] * 1e3:.2f}" for name in ("mean", "p50", "p99")), str(summary["n"])]
        for stage, summary in pooled_stages(episodes).items()
    ]
    return table(["stage", "mean ms", "p50 ms", "p99 ms", "steps"], rows, 1) if rows else ""


def _flags(episodes: Sequence[EpisodeResult]) -> str:
    """What the policy said about its steps, over all of them."""
    numbers: dict[str, list[tuple[float, int]]] = {}
    texts: dict[str, dict[str, int]] = {}
    for episode in episodes:
        for name, summary in episode.flags.items():
            if "counts" in summary:
                counts = texts.setdefault(name, {})
                for text, steps in summary["counts"].items():
                    counts[text] = counts.get(text, 0) + steps
            else:
                numbers.setdefault(name, []).append((summary["mean"], summary["n"]))
    rows = []
    for name, means in numbers.items():
        values, steps = np.array(means).T
        rows.append([escape(name), f"mean {np.average(values, weights=steps):.4g}", f"{steps.sum():.0f}"])
    for name, counts in texts.items():
        total = sum(counts.values())
        most = sorted(counts.items(), key=lambda item: -item[1])[:8]
        shares = ", ".join(f"{escape(text)} {percent(steps / total)}" for text, steps in most)
        rows.append([escape(name), shares, str(total)])
    return f"<h3>Flags of the policy</h3>{table(['flag', 'over all steps', 'steps'], rows, 2)}" if rows else ""


def _errors(episodes: Sequence[EpisodeResult]) -> str:
    parts = [
        f"<details><summary>{escape(str(episode.key))}: after {episode.steps} steps</summary>"
        f"<pre>{escape(episode.error or '')}</pre></details>"
        for episode in episodes
        if episode.outcome == "error"
    ]
    return f"<h3>Errors</h3>{''.join(parts)}" if parts else ""


def _provenance(configuration: Mapping[str, Any], episodes: Sequence[EpisodeResult]) -> str:
    rows = [[escape(name), escape(value)] for name, value in _flat(configuration)]
    facts: dict[str, set[str]] = {}
    for episode in episodes:
        for name, value in episode.provenance.items():
            facts.setdefault(name, set()).add(str(value))
    known = {row[0].rpartition(".")[2] for row in rows}
    rows += [
        [escape(name), escape(" / ".join(sorted(values)))]
        for name, values in sorted(facts.items())
        if name not in known
    ]
    cells = "".join(f'<tr><td class="soft">{name}</td><td class="fact">{value}</td></tr>' for name, value in rows)
    return f"<h3>Configuration and provenance</h3><table><tbody>{cells}</tbody></table>"


def _flat(configuration: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in configuration.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return found
