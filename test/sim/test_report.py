"""The page of a run: everything in it, nothing from elsewhere."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sim.errors import ConfigurationError
from sim.report import make_page, write_report
from sim.results import EpisodeKey, EpisodeResult, RunFile
from sim.step_log import encode_video

CONFIGURATION = {
    "policy": {"name": "mini", "options": {"keep": 80}},
    "env": {"renderer": "fast", "cameras": ["agentview"]},
    "versions": {"mujoco": "3.3.2"},
}


def episode(task: int, state: int, outcome: str, variant: str = "", **changes: object) -> EpisodeResult:
    made = EpisodeResult(
        key=EpisodeKey("libero_goal", task, state, 0, variant),
        language=f"instruction of task {task}",
        outcome=outcome,
        steps=4,
        started="2024-01-01T00:00:00+00:00",
        finished="2024-01-02T00:00:00+00:00",
        actions=np.zeros((4, 7), np.float32),
        timing={"policy": np.array([0.010, 0.020, 0.020, 0.030]), "vision": np.array([0.015, *[np.nan] * 3])},
        flags={"reused": {"mean": 0.25, "n": 4}, "reason": {"counts": {"same view": 1, "fresh": 3}}},
        provenance={"gl_renderer": "llvmpipe"},
        error="Traceback: <script>alert(1)</script>" if outcome == "error" else None,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def video() -> bytes:
    return encode_video([np.full((32, 64, 3), 20 * number, np.uint8) for number in range(8)])


EPISODES = [episode(0, 0, "success"), episode(0, 1, "failure"), episode(0, 2, "error"), episode(1, 0, "success")]


class Page(HTMLParser):
    """Tags that are open at the end, addresses that something is loaded from, tags seen, and the visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "poster", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_whole_and_asks_the_network_for_nothing(video: bytes) -> None:
    text = make_page("run", {"": CONFIGURATION}, {"": [*EPISODES, episode(1, 1, "failure", video=video)]})
    page = Page(text)
    assert page.open == []
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "url(http" not in text
    assert "@import" not in text
    assert text.count("<svg") == 2


def test_tables_have_counts_intervals_and_latency() -> None:
    text = Page(make_page("run", {"": CONFIGURATION}, {"": EPISODES})).text
    assert "66.7 %" in text  # 2 of 3: the error is not counted
    assert "2 of 3" in text
    assert "21 - 94 %" in text
    assert "instruction of task 1" in text
    assert "policy 20.00 20.00 30.00 16" in text
    assert "vision 15.00 15.00 15.00 4" in text  # over the steps that had it
    assert "reused mean 0.25 16" in text
    assert "fresh 75.0 %, same view 25.0 %" in text
    assert "policy.options.keep 80" in text
    assert "gl_renderer llvmpipe" in text


def test_what_an_episode_says_is_shown_and_never_run() -> None:
    page = Page(make_page("run", {"": CONFIGURATION}, {"": EPISODES}))
    assert "script" not in page.tags
    assert "Traceback: <script>alert(1)</script>" in page.text


def test_videos_are_a_few_of_each_task(video: bytes) -> None:
    recorded = [episode(task, state, "failure", video=video) for task in (0, 1) for state in range(3)]
    page = make_page("run", {"": CONFIGURATION}, {"": recorded}, videos=2)
    shown = re.findall(r"<figcaption>libero_goal task (\d) state (\d)", page)
    assert shown == [("0", "0"), ("1", "0")]
    assert "2 of 6 that the run has" in page
    assert page.count("data:image/jpeg;base64,") == 2


def test_variants_are_set_side_by_side() -> None:
    variants = {"none": CONFIGURATION, "keep 80": CONFIGURATION}
    parts = {name: [episode(0, state, "success", name) for state in range(3)] for name in variants}
    page = make_page("run", variants, parts)
    assert "Variants" in Page(page).text
    assert page.count("<svg") == 5


def test_arms_have_a_picture_of_each_cost_and_paired_differences_from_the_first() -> None:
    flops = {"none-off": 2e9, "flashvla-80-gated": 1e9}
    parts = {
        name: [
            episode(
                0, state, "success", name, flags={"flops": {"mean": value, "n": 3}, "reuse": {"mean": 0.25, "n": 4}}
            )
            for state in range(3)
        ]
        for name, value in flops.items()
    }
    page = make_page("run", dict.fromkeys(sorted(flops), CONFIGURATION), parts)
    text = Page(page).text
    assert page.count("<svg") == 6
    assert "policy, mean ms a step" in text
    assert "GFLOPs a step, mean" in text
    assert "20.0 20.0 30.0 25.0 % 0.75" in text  # of every four steps three looked
    assert "flashvla-80-gated 3 +0.0 (+0.0 to +0.0) 0 / 0 1 +0.0 (+0.0 to +0.0) -50.0 (-50.0 to -50.0)" in text


def test_a_run_without_episodes_and_one_of_errors_alone_have_a_page() -> None:
    assert Page(make_page("run", {"": CONFIGURATION}, {"": []})).open == []
    failed = episode(0, 0, "error", steps=0, actions=np.zeros((0, 7), np.float32), timing={}, flags={})
    assert "1 errors" in Page(make_page("run", {"": CONFIGURATION}, {"": [failed]})).text


def test_the_same_run_gives_the_same_page(tmp_path: Path, video: bytes) -> None:
    with RunFile(tmp_path / "run", write=True) as run:
        run.configure("", CONFIGURATION)
        for one in EPISODES:
            run.add(one)
    pages = []
    for name in ("a.html", "b.html"):
        write_report(tmp_path / "run", tmp_path / "new" / name)
        pages.append((tmp_path / "new" / name).read_text())
    assert pages[0] == pages[1]


def test_no_page_is_made_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no run"):
        write_report(tmp_path / "missing", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
