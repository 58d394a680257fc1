"""Runs: they learn, repeat, go on exactly after any end, and refuse what does not fit."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

from mllm.checkpoint import load_checkpoint  # noqa: E402
from mllm.errors import PolicyError  # noqa: E402
from mllm.policy import Observation, make_policy  # noqa: E402
from mllm.training.config import TrainConfig  # noqa: E402
from mllm.training.state import read_facts  # noqa: E402
from mllm.training.trainer import Trainer  # noqa: E402


def silent(line: str) -> None:
    pass


def trained(settings, runs, until=None, **change):
    trainer = Trainer(TrainConfig(**{**settings, **change}), runs, silent)
    trainer.run(until)
    return trainer


def state(trainer):
    return load_file(trainer.folder / "state.safetensors")


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("change", [None, {"decoding": "causal", "proprio": ["eef_pos"]}], ids=["numbers", "tokens"])
def test_a_run_learns_to_point_at_what_it_sees(settings, tmp_path, change):
    settings |= {"steps": 150, "batch": 16, "validation": 0.0, "shift": 0, "change": change or settings["change"]}
    trainer = trained(settings, tmp_path)
    rows = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train/move_error"] < 0.35
    trainer.checked = trainer.frames
    assert trainer.validate(64)["move_error"] < 0.12
    assert (trainer.folder / "curves.png").stat().st_size > 1000


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(settings, tmp_path):
    one, same = (state(trained(settings, tmp_path / name)) for name in ("one", "same"))
    assert_equal(one, same)
    other = state(trained(settings, tmp_path / "other", seed=1))
    assert not torch.equal(one["learner.model.action_slots"], other["learner.model.action_slots"])


def test_images_are_not_augmented_by_the_numbers_that_chose_them(settings, tmp_path):
    trainer = Trainer(TrainConfig(**settings), tmp_path, silent)
    augmentation = [trainer.batch(step)[1].random() for step in range(3)]
    frames = [np.random.default_rng([0, step]).random() for step in range(3)]
    assert len({*augmentation, *frames}) == 6


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_in_two_parts_equals_one_in_one(settings, tmp_path, precision):
    settings |= {"steps": 4, "batch": 2, "validation": 0.0, "precision": precision}  # bfloat16 may be slow
    whole = state(trained(settings, tmp_path / "whole"))
    trained(settings, tmp_path / "parts", until=2)
    assert_equal(whole, state(trained(settings, tmp_path / "parts")))


def test_a_run_that_was_killed_goes_on_to_the_same_weights(settings, tmp_path):
    settings |= {"steps": 40, "checkpoint_seconds": 1.0, "log_seconds": 0.1}
    whole = state(trained(settings, tmp_path / "whole"))
    (tmp_path / "run.yaml").write_text(json.dumps({**settings, "data": list(settings["data"])}))
    command = [sys.executable, "-m", "flashvla_ros.cli", "train", str(tmp_path / "run.yaml"), "--runs", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step ") and "held out" not in line and int(line.split()[1].split("/")[0]) > 3:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    subprocess.run(command, check=True, capture_output=True)
    assert_equal(whole, load_file(tmp_path / "run" / "state.safetensors"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_a_kill_while_the_last_checkpoint_is_written_leaves_one_and_the_run_goes_on(settings, tmp_path):
    settings["steps"] = 3
    code = f"""
import json, os, signal
from pathlib import Path
from mllm.training.config import TrainConfig
from mllm.training.trainer import Trainer
trainer = Trainer(TrainConfig(**json.loads({json.dumps(settings)!r})), Path({str(tmp_path)!r}), print)
trainer.run(1)
trainer.tokenizer.save = lambda folder: os.kill(os.getpid(), signal.SIGKILL)  # in the middle of a checkpoint
trainer.run()
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    folder = tmp_path / "run"
    assert read_facts(folder)["step"] == 1
    load_checkpoint(folder / "checkpoint")
    trainer = trained(settings, tmp_path)
    assert read_facts(folder)["step"] == 3
    assert_equal(load_checkpoint(folder / "checkpoint")[0].state_dict(), trainer.average.model.state_dict())
    assert not list(folder.glob(".checkpoint*"))


def test_what_a_run_ships_is_a_policy_that_knows_how_it_was_shown_the_world(settings, tmp_path):
    trainer = trained(settings, tmp_path, until=1)
    policy = make_policy("mini", checkpoint=str(trainer.folder / "checkpoint"))
    assert policy.render == {"renderer": "fast", "image_size": 32}
    policy.reset("pick up the bowl")
    images = {name: np.zeros((32, 32, 3), np.uint8) for name in ("agentview", "robot0_eye_in_hand")}
    observation = Observation(images, {"eef_pos": np.zeros(3), "gripper_qpos": np.zeros(2)})
    assert [policy.act(observation).flags["chunk_step"] for _ in range(4)] == [0, 1, 0, 1]


def test_a_run_does_not_go_on_with_another_configuration_or_other_data(settings, tmp_path, demonstrations):
    trained(settings, tmp_path, until=1)
    with pytest.raises(PolicyError, match="batch was 8 and is 4"):
        Trainer(TrainConfig(**{**settings, "batch": 4}), tmp_path, silent)
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for path in sorted(demonstrations.glob("*.hdf5"))[1:]:
        (fewer / path.name).write_bytes(path.read_bytes())
    with pytest.raises(PolicyError, match="data was"):
        Trainer(TrainConfig(**{**settings, "data": [str(fewer)]}), tmp_path, silent)
    one = demonstrations / "seed_00000000.hdf5"
    one.rename(tmp_path / "aside")
    try:
        with pytest.raises(PolicyError, match="began with other demonstrations"):
            Trainer(TrainConfig(**settings), tmp_path, silent)
    finally:
        (tmp_path / "aside").rename(one)


def test_a_run_of_a_version_without_a_field_goes_on_at_its_default(settings, tmp_path):
    path = trained(settings, tmp_path, until=1).folder / "state.safetensors"
    facts = read_facts(path.parent)
    del facts["config"]["frozen"]
    save_file(load_file(path), path, {"facts": json.dumps(facts)})
    assert Trainer(TrainConfig(**settings), tmp_path, silent).step == 1
    with pytest.raises(PolicyError, match=r"frozen was \[\] and is \['projector'\]"):
        Trainer(TrainConfig(**settings, frozen=["projector"]), tmp_path, silent)


def test_a_damaged_state_is_an_error_that_names_it(settings, tmp_path):
    trainer = trained(settings, tmp_path, until=1)
    path = trainer.folder / "state.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PolicyError, match=r"state\.safetensors is damaged"):
        Trainer(TrainConfig(**settings), tmp_path, silent)


@pytest.mark.parametrize("what", ["checkpoint", r"state\.safetensors"])
def test_a_full_disk_is_an_error_and_keeps_the_last_state_and_a_checkpoint(settings, tmp_path, what):
    trainer = trained(settings, tmp_path, until=2)
    before = state(trainer)
    weights = (trainer.folder / "checkpoint" / "model.safetensors").stat().st_size
    room = 20_000 if what == "checkpoint" else weights + 1000  # a state is several times as large
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        with pytest.raises(OSError, match=f"{what} was not written"):
            trainer.run(3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert_equal(before, state(trainer))
    load_checkpoint(trainer.folder / "checkpoint")
    assert not [*trainer.folder.glob(".*.tmp"), *trainer.folder.glob(".checkpoint*")]


def test_a_loss_that_is_no_number_ends_the_run(settings, tmp_path):
    with pytest.raises(PolicyError, match="lower muon_rate and adamw_rate"):
        trained(settings, tmp_path, muon_rate=1.0, adamw_rate=1.0, clip=1e6, warmup=0, weight_decay=10.0, steps=400)


def test_adapters_alone_are_trained_and_the_shipped_model_has_none(settings, tmp_path):
    pytest.importorskip("accelerate")
    trainer = trained(settings, tmp_path, lora_rank=2, until=3)
    moving = [name for name, weight in trainer.learner.model.named_parameters() if weight.requires_grad]
    assert moving
    assert all("lora" in name or name.startswith(("action_", "proprio_")) for name in moving)
    policy = make_policy("mini", checkpoint=str(trainer.folder / "checkpoint"))
    inputs = torch.randn(1, 7, 32)
    positions = torch.arange(7)[None]
    expected = trainer.average.model.language_model.model(inputs, positions)
    torch.testing.assert_close(policy.model.language_model.model(inputs, positions), expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(
        policy.model.language_model.model.layers[0].mlp.down_proj.weight,
        trainer.learner.model.language_model.model.layers[0].mlp.down_proj.get_base_layer().weight,
    )


def test_what_is_frozen_stays_so_beside_adapters(settings, tmp_path):
    pytest.importorskip("accelerate")
    trainer = Trainer(TrainConfig(**settings, lora_rank=2, frozen=["action_head"]), tmp_path, silent)
    moving = {name for name, weight in trainer.learner.model.named_parameters() if weight.requires_grad}
    assert any("lora" in name for name in moving)
    assert not any(name.startswith("action_head") for name in moving)


def test_frozen_modules_stay_as_they_were_and_the_rest_learns(settings, tmp_path):
    first = trained(settings, tmp_path / "first", until=1, muon_rate=0.0, adamw_rate=0.0)
    run = trained(settings, tmp_path / "run", frozen=["vision_backbone"])
    before, after = first.learner.model.state_dict(), run.learner.model.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    unused = {"language_model.lm_head.weight"}  # the model answers with numbers
    assert same - unused == {name for name in before if name.startswith("vision_backbone.")}
    with pytest.raises(PolicyError, match="no module 'eyes'; it has vision_backbone"):
        trained(settings, tmp_path / "wrong", frozen="eyes")


def test_processes_stop_together_when_one_is_told_to(tmp_path):
    code = """
import sys, torch
from mllm.training.trainer import any_of
rank, place = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
cpu = torch.device("cpu")
assert not any_of(False, 2, cpu)
assert any_of(rank == 1, 2, cpu)
torch.distributed.destroy_process_group()
"""
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [subprocess.Popen([*command, rank, str(tmp_path / "group")], env=environment) for rank in ("0", "1")]
    try:
        assert [process.wait(timeout=100) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


def test_two_processes_learn_what_one_does(settings, tmp_path):
    settings |= {"steps": 3, "shift": 0, "jitter": 0.0, "proprio_noise": 0.0}
    # With one action an answer every sample counts alike, so that the mean of two halves is the mean of the whole.
    settings["change"] = {**settings["change"], "chunk": 1, "execute": 1}
    one = state(trained(settings, tmp_path / "one"))
    (tmp_path / "run.yaml").write_text(json.dumps({**settings, "data": list(settings["data"])}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "flashvla_ros.cli", "train", str(tmp_path / "run.yaml"), "--runs"]
    # What torchrun sets for each of its processes.
    shared = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen([*command, str(tmp_path / "two")], env={**shared, "WORLD_SIZE": "2", "RANK": rank})
        for rank in ("0", "1")
    ]
    try:
        assert [process.wait(timeout=200) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    two = load_file(tmp_path / "two" / "run" / "state.safetensors")
    for name, value in one.items():
        if name.startswith("learner."):
            torch.testing.assert_close(value, two[name], atol=2e-3, rtol=0)
