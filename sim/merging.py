"""Several runs in one file: parts of an evaluation, or its variants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sim.errors import ConfigurationError
from sim.results import RunFile


def merge(out: Path, sources: Sequence[Path]) -> tuple[int, int]:
    """Adds the episodes of every run in `sources` to `out`, which may exist. Returns (added, already there).

    Of an episode that two runs have, an error gives way to a result, and equal results are one.
    Raises ConfigurationError: equal variants with different configurations, or an episode with two different results;
    whatever was merged before that stays.
    """
    added = known = 0
    with RunFile(out, write=True) as run:
        have = {episode.key: (episode.outcome, episode.steps) for episode in run.episodes()}
        for path in sources:
            with RunFile(path) as source:
                for variant, configuration in source.configurations().items():
                    run.configure(variant, configuration)
                for episode in source.episodes(videos=True):
                    before, now = have.get(episode.key), (episode.outcome, episode.steps)
                    if before is None or (before[0] == "error" and now[0] != "error"):
                        run.add(episode)
                        have[episode.key] = now
                        added += 1
                    elif now[0] == "error" or now == before:
                        known += 1
                    else:
                        raise ConfigurationError(
                            f"{episode.key} ended in {now[0]} after {now[1]} steps in {path}, and in {before[0]} after "
                            f"{before[1]} steps in {out}: leave one of the two runs out"
                        )
    return added, known
