"""The videos of a report: inside the page, with their last picture to show what they are about."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from sim.results import EpisodeResult


def films(episodes: Sequence[EpisodeResult], most: int) -> str:
    """The section of recorded episodes, at most `most`: a few of each task rather than all of the first."""
    recorded = [episode for episode in episodes if episode.video]
    if not recorded or not most:
        return ""
    turns: dict[tuple[str, int], int] = {}
    order = []
    for episode in recorded:
        task = (episode.key.suite, episode.key.task)
        turns[task] = turns.get(task, 0) + 1
        order.append((turns[task], episode))
    chosen = [episode for _, episode in sorted(order, key=lambda item: item[0])[:most]]
    figures = "".join(
        f'<figure><video controls loop muted playsinline preload="none" poster="{_poster(episode.video or b"")}" '
        f'src="data:video/mp4;base64,{base64.b64encode(episode.video or b"").decode()}"></video>'
        f"<figcaption>{escape(str(episode.key))}<br>{escape(episode.language)}: {episode.outcome} after "
        f"{episode.steps} steps</figcaption></figure>"
        for episode in chosen
    )
    left = f" {len(chosen)} of {len(recorded)} that the run has." if len(chosen) < len(recorded) else ""
    said = f'<p class="soft">Each picture is the last one of its video.{left}</p>'
    return f'<h3>Failures</h3>{said}<div class="films">{figures}</div>'


def _poster(video: bytes) -> str:
    """The last frame of an MP4 as a data URI."""
    import av

    with av.open(io.BytesIO(video), "r") as container:
        *_, last = container.decode(video=0)
        image = last.to_image()
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
