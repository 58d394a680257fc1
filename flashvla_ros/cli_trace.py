"""`flashvla trace`: a recorded episode as one picture."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Trace:
    """Draw a recorded episode over time: actions, what reuse goes by (angle, overlap), its reasons, and latency."""

    bag: tyro.conf.Positional[Path]
    """rosbag2 with /policy/step, or a folder of `flashvla demo`."""
    out: tyro.conf.Positional[Path]
    """Picture to write: .png, .svg or .pdf."""

    def run(self) -> int:
        from flashvla_ros.bag_trace import read_bag
        from flashvla_ros.trace_plot import draw_trace, summary

        trace = read_bag(self.bag)
        draw_trace(trace, self.out)
        sys.stdout.write(f"{summary(trace)}\n{self.out}\n")
        return 0


COMMANDS = {"trace": Trace}
