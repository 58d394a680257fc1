"""Quantises a policy for the command line: the checkpoint, the table, the picture, and how far the actions moved."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from flashvla_ros.console import table_console
from flashvla_ros.quantize_plot import draw_report
from mllm.checkpoint import save_checkpoint, write_json
from mllm.diffusion.tune import TuneConfig, diffusion_head, tune_head_
from mllm.quantise import hold_out, observe, quantised, sensitivity
from mllm.sweep import Clip, deviation, replay
from mllm.vla_policy import VLAPolicy
from quant.config import MSFPConfig
from quant.convert import Packed, Report
from sim.statistics import bootstrap


def quantize(
    policy: VLAPolicy,
    config: MSFPConfig,
    clips: Sequence[Clip],
    check: int,
    out: Path,
    facts: Mapping[str, Any],
    sensitive: bool,
    json_output: bool,
    tune: TuneConfig | None = None,
) -> None:
    """Calibrates on the clips but for about `check` of them, on which the actions are compared; writes `out`.

    facts: what the report says too.  sensitive: whether each group of layers is tried alone.
    tune: how the diffusion head is fine-tuned, if it is.
    """
    console = table_console(json_output)
    teacher = None if tune is None else copy.deepcopy(diffusion_head(policy.model).denoiser)
    seen_clips, checked = hold_out(clips, check)
    reference = replay(policy, checked)
    seen = observe(policy, seen_clips)
    groups = []
    if sensitive:
        for group, apart in sensitivity(policy, config, seen, seen_clips, checked, reference):
            groups.append({"group": group, **_apart(apart)})
            sys.stderr.write(f"{group} alone: error {groups[-1]['error']['mean']:.5f}\n")
    with quantised(policy, config, seen, seen_clips) as report:
        moved = _apart(deviation(reference, replay(policy, checked)))
        tuned: dict[str, Any] = {}
        if tune is not None and teacher is not None:
            tuned = {"config": asdict(tune), "untuned": moved, **tune_head_(policy, teacher, seen_clips, tune)}
            moved = _apart(deviation(reference, replay(policy, checked)))
        save_checkpoint(out, policy.model, policy.tokenizer)
    found = {
        **facts,
        "config": asdict(config),
        "observations": len(seen_clips),
        "checked": {"clips": len(checked), "actions": sum(len(one) for one in reference.actions), **moved},
        "groups": groups,
        **({"head": tuned} if tuned else {}),
        **report.to_json(),
        "bytes": sum(path.stat().st_size for path in out.glob("*.safetensors")),
    }
    write_json(out / "report.json", found)
    draw_report(report, out / "report.png")
    console.print(layers_table(report, title=f"{config.family}, weights of {config.bits} bits: {out}"))
    for one in report.left:
        console.print(f"left as it is: {one.name} ({one.kind}, {one.numbers} numbers): {one.why}", highlight=False)
    if groups:
        console.print(groups_table(groups))
    if tuned:
        console.print(
            f"the head's loss went from {tuned['first']:.3g} to {tuned['last']:.3g}; its steps use the copies "
            f"{tuned['table']}. Before fine-tuning: error of the pose {_shown(tuned['untuned']['error'])}, another "
            f"command of the gripper in {_shown(tuned['untuned']['gripper'], 100)} % of the steps",
            highlight=False,
        )
    console.print(
        f"{len(checked)} looks of other episodes: error of the pose {_shown(moved['error'])}, another command of the "
        f"gripper in {_shown(moved['gripper'], 100)} % of the steps",
        highlight=False,
    )
    if json_output:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")


def _apart(apart: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Means over clips with their 95 % intervals."""
    return {
        name: {"mean": float(apart[name].mean()), "interval": bootstrap(np.mean, [apart[name]], 2000, seed=0)}
        for name in ("error", "gripper")
    }


def _shown(value: Mapping[str, Any], factor: float = 1.0) -> str:
    low, high = value["interval"]
    return f"{factor * value['mean']:.4g} ({factor * low:.4g} - {factor * high:.4g})"


def layers_table(report: Report, title: str) -> Table:
    """One row a layer, in the order in which they run."""
    table = Table(title=title)
    for name in ("layer", "size", "weights"):
        table.add_column(name, no_wrap=True)
    for name in ("clip", "NMSE", "inputs", "least", "largest", "NMSE", "no sign"):
        table.add_column(name, justify="right")
    for one in report.layers:
        table.add_row(
            one.name, f"{one.outputs} x {one.inputs}", weight_formats(one), f"{one.clip:.3g}", f"{one.weight_nmse:.2e}",
            *_inputs(one), one.anomalous,
        )  # fmt: skip
    return table


def weight_formats(one: Packed) -> str:
    """ "E2M1", or of several "E2M1 120, E1M2 72"."""
    ordered = sorted(one.formats.items(), key=lambda item: -item[1])
    return ordered[0][0] if len(ordered) == 1 else ", ".join(f"{name} {count}" for name, count in ordered)


def _inputs(one: Packed) -> tuple[str, str, str, str]:
    if one.activation is None:
        return "float", "", "", ""
    low, high = one.activation.range
    return one.activation.format.name, f"{low:.3g}", f"{high:.3g}", f"{one.input_nmse:.2e}"


def groups_table(groups: Sequence[Mapping[str, Any]]) -> Table:
    """The costliest group first."""
    table = Table("quantised alone", title="error of the pose, and of the gripper's commands")
    for name in ("error", "gripper, %"):
        table.add_column(name, justify="right")
    for one in sorted(groups, key=lambda one: -one["error"]["mean"]):
        table.add_row(one["group"], _shown(one["error"]), _shown(one["gripper"], 100))
    return table
