"""All arms on a model that takes a second: every arm alike, and a run that goes on after a kill."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from mllm.diffusion.arms import ARMS, QuantiseConfig, Subject, draw  # noqa: E402
from mllm.diffusion.denoiser import Denoiser, DenoiserConfig  # noqa: E402
from mllm.diffusion.experiment import CLAIMS, ROWS, ExperimentConfig, outcomes, read_rows, run_experiment  # noqa: E402
from mllm.diffusion.fit import init_linear  # noqa: E402
from mllm.diffusion.schedule import Schedule  # noqa: E402
from mllm.errors import PolicyError  # noqa: E402
from quant.dfa import DistilConfig  # noqa: E402

CONFIG = ExperimentConfig(1, QuantiseConfig(distil=DistilConfig(updates=12, batch=16, rate=0.02)))


class TinyTask:
    """A denoiser at random, and how far each arm draws from it."""

    name = "tiny"

    def __init__(self, width=8):
        self.width, self.schedule, self.made = width, Schedule(50, 4), 0

    @property
    def facts(self):
        return {"width": self.width}

    def subject(self, seed):
        self.made += 1
        generator = torch.Generator().manual_seed(seed)
        model = Denoiser(DenoiserConfig(3, width=self.width, depth=1)).requires_grad_(False)
        init_linear(model, generator)
        return Subject(model, self.schedule, torch.randn(64, 3, generator=generator))

    def measure(self, subject, at, seed):
        noise = torch.randn(100, 3, generator=torch.Generator().manual_seed(seed + 1000))
        full = draw(lambda _: subject.model, subject.schedule, noise)
        return {"apart": float((draw(at, subject.schedule, noise) - full).square().mean().sqrt())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run_experiment(folder, [TinyTask()], CONFIG, lambda line: None), folder


def test_every_arm_has_a_row_a_seed_and_full_precision_is_apart_by_nothing(whole):
    rows, folder = whole
    assert [(row["seed"], row["arm"]) for row in rows] == [(0, arm.name) for arm in ARMS]
    assert read_rows(folder) == rows
    for row in rows:
        assert (row["metrics"]["apart"] == 0) == (row["arm"] == "full precision")
        assert ("loss" in row) == ("LoRA" in row["arm"])
    by = {row["arm"]: row for row in rows}
    assert by["MSFP + LoRA"]["bytes"] == by["MSFP + LoRA of equal size"]["bytes"] == by["MSFP"]["bytes"]
    assert by["MSFP + TALoRA"]["bytes"] == 2 * by["MSFP"]["bytes"]
    assert set(by["MSFP + TALoRA"]["table"]) == {0, 1}
    assert by["MSFP + TALoRA"]["loss"] != by["MSFP + TALoRA + DFA"]["loss"]


def test_packed_models_draw_what_the_fake_quantised_ones_draw(whole):
    for row in whole[0]:
        if row["arm"] != "full precision":
            assert row["deployed"] < 0.1 * row["metrics"]["apart"], row["arm"]


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_and_ends_with_the_same_rows(whole, tmp_path):
    said = 0

    def kill(line):
        nonlocal said
        said += 1
        if said == 6:
            raise Killed

    with pytest.raises(Killed):
        run_experiment(tmp_path, [TinyTask()], CONFIG, kill)
    with (tmp_path / ROWS).open("a") as file:
        file.write('{"task": "tiny", "se')
    told: list[str] = []
    assert run_experiment(tmp_path, [TinyTask()], CONFIG, told.append) == whole[0]
    assert len(told) == len(ARMS) - 6
    task = TinyTask()
    assert run_experiment(tmp_path, [task], CONFIG, told.append) == whole[0]
    assert task.made == 0


def test_rows_of_other_settings_and_damaged_ones_are_refused(tmp_path):
    few = ExperimentConfig(2, CONFIG.quantise)
    rows = run_experiment(tmp_path, [TinyTask()], few, lambda line: None, ARMS[:2])
    assert [row["seed"] for row in rows] == [0, 0, 1, 1]
    assert rows[1]["metrics"] != rows[3]["metrics"]
    with pytest.raises(PolicyError, match="width was 8 and is 16"):
        run_experiment(tmp_path, [TinyTask(16)], few, lambda line: None)
    with pytest.raises(PolicyError, match="quantise was"):
        run_experiment(tmp_path, [TinyTask()], ExperimentConfig(1), lambda line: None)
    (tmp_path / ROWS).write_text('{"task": "tiny"}\n')
    with pytest.raises(PolicyError, match="line 1"):
        read_rows(tmp_path)


def test_outcomes_compare_each_arm_with_the_one_it_must_beat_seed_by_seed():
    values = {"signed FP": (5.0, 9.0), "MSFP": (4.0, 7.0)}
    rows = [
        {"task": "t", "seed": seed, "arm": arm, "metrics": {"m": value[seed]}, "bytes": 10}
        for arm, value in values.items()
        for seed in (0, 1)
    ]
    signed, msfp = outcomes([*rows, {**rows[0], "task": "other"}], "t", "m")
    assert (signed.mean, signed.against, signed.difference) == (7, None, None)
    assert (msfp.arm, msfp.n, msfp.mean, msfp.against) == ("MSFP", 2, 5.5, "signed FP")
    assert (msfp.difference, msfp.better) == (-1.5, 2)
    assert msfp.deviation == pytest.approx(0.5**0.5)
    json.dumps(vars(msfp))


def test_claims_name_arms():
    names = [arm.name for arm in ARMS]
    assert len(set(names)) == len(names)
    assert {*CLAIMS, *CLAIMS.values()} <= set(names)
