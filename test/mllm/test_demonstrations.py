"""One episode's file: what goes in comes out, others can read it, and damage is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from mllm.demonstrations import (
    Demonstration,
    decode_image,
    decode_images,
    demonstration_files,
    encode_image,
    read_demonstration,
    write_demonstration,
)
from mllm.errors import PolicyError

STEPS = 5  # of what `make_demonstration` makes by itself


def assert_same(one: Demonstration, other: Demonstration) -> None:
    assert list(one.objects) == list(other.objects)
    for name, places in one.objects.items():
        np.testing.assert_array_equal(places, other.objects[name])
    for name in ("actions", "executed", "states", "targets", "phases"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    for name, values in one.proprio.items():
        np.testing.assert_array_equal(values, other.proprio[name])
    for name in (
        "phase_names",
        "instruction",
        "suite",
        "task",
        "seed",
        "outcome",
        "source",
        "env_args",
        "provenance",
    ):
        assert getattr(one, name) == getattr(other, name)


def test_a_raw_file_gives_back_every_number_and_pixel(make_demonstration, tmp_path):
    demonstration = make_demonstration()
    write_demonstration(tmp_path / "seed_00000000.hdf5", demonstration)
    read = read_demonstration(tmp_path / "seed_00000000.hdf5")
    assert_same(demonstration, read)
    for camera, images in demonstration.images.items():
        np.testing.assert_array_equal(images, read.images[camera])


def test_a_webp_file_gives_back_encoded_images_close_to_the_originals(make_demonstration, tmp_path):
    demonstration = make_demonstration(size=64)
    write_demonstration(tmp_path / "demo.hdf5", demonstration, images="webp")
    read = read_demonstration(tmp_path / "demo.hdf5")
    assert_same(demonstration, read)
    for camera, images in demonstration.images.items():
        assert all(isinstance(frame, bytes) for frame in read.images[camera])
        difference = decode_images(read.images[camera]).astype(int) - images
        assert np.abs(difference).mean() < 4
    decoded = read_demonstration(tmp_path / "demo.hdf5", decode=True)
    np.testing.assert_array_equal(decoded.images["agentview"], decode_images(read.images["agentview"]))


def test_encoded_images_are_written_again_as_they_are(make_demonstration, tmp_path):
    write_demonstration(tmp_path / "one.hdf5", make_demonstration(), images="webp")
    write_demonstration(tmp_path / "two.hdf5", read_demonstration(tmp_path / "one.hdf5"), images="webp")
    assert (tmp_path / "one.hdf5").read_bytes() == (tmp_path / "two.hdf5").read_bytes()


def test_encoding_keeps_the_order_of_colours_and_rows():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:16] = (250, 120, 10)
    decoded = decode_image(encode_image(image))
    np.testing.assert_allclose(decoded[4, 16], (250, 120, 10), atol=6)
    np.testing.assert_allclose(decoded[28, 16], 0, atol=6)


def test_plain_h5py_finds_what_libero_and_robomimic_look_for(make_demonstration, tmp_path):
    demonstration = make_demonstration()
    write_demonstration(tmp_path / "demo.hdf5", demonstration)
    with h5py.File(tmp_path / "demo.hdf5") as file:
        data, demo = file["data"], file["data/demo_0"]
        assert json.loads(data.attrs["problem_info"]) == {
            "problem_name": "libero_tabletop_manipulation",
            "domain_name": "robosuite",
            "language_instruction": "put the bowl on the plate",
        }
        assert json.loads(data.attrs["env_args"])["bddl_file"] == "libero_goal/x.bddl"
        assert (data.attrs["num_demos"], data.attrs["total"], demo.attrs["num_samples"]) == (1, STEPS, STEPS)
        shapes = {
            name: (demo[name].shape, demo[name].dtype) for name in ("actions", "robot_states", "rewards", "dones")
        }
        assert shapes == {
            "actions": ((STEPS, 7), np.float64),
            "robot_states": ((STEPS, 9), np.float64),
            "rewards": ((STEPS,), np.uint8),
            "dones": ((STEPS,), np.uint8),
        }
        widths = {name: demo["obs"][name].shape[1:] for name in demo["obs"]}
        assert widths == {
            "agentview_rgb": (16, 16, 3),
            "eye_in_hand_rgb": (16, 16, 3),
            "ee_pos": (3,),
            "ee_ori": (3,),
            "ee_states": (6,),
            "gripper_states": (2,),
            "joint_states": (7,),
        }
        np.testing.assert_array_equal(demo["obs/agentview_rgb"][:], demonstration.images["agentview"][:, ::-1])
        assert demo["rewards"][:].tolist() == demo["dones"][:].tolist() == [0, 0, 0, 0, 1]


def test_a_failure_ends_without_a_reward(make_demonstration, tmp_path):
    write_demonstration(tmp_path / "demo.hdf5", make_demonstration(outcome="failure"))
    with h5py.File(tmp_path / "demo.hdf5") as file:
        assert file["data/demo_0/rewards"][:].tolist() == [0, 0, 0, 0, 0]
        assert file["data/demo_0/dones"][:].tolist() == [0, 0, 0, 0, 1]


def test_frames_in_which_the_expert_was_lost_are_not_valid(make_demonstration):
    assert make_demonstration().valid.tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("images", ["raw", "webp"])
def test_a_truncated_file_is_an_error_that_names_it(make_demonstration, tmp_path, images):
    path = tmp_path / "seed_00000003.hdf5"
    write_demonstration(path, make_demonstration(), images)
    content = path.read_bytes()
    for length in range(0, len(content), len(content) // 40):
        path.write_bytes(content[:length])
        with pytest.raises(PolicyError, match=r"seed_00000003\.hdf5"):
            read_demonstration(path)


@pytest.mark.parametrize("images", ["raw", "webp"])
def test_a_changed_byte_is_noticed_unless_nothing_is_read_from_it(make_demonstration, tmp_path, images):
    path = tmp_path / "demo.hdf5"
    write_demonstration(path, make_demonstration(), images)
    content, original = path.read_bytes(), read_demonstration(path)
    noticed = 0
    positions = np.random.default_rng(1).choice(len(content), 200, replace=False)
    for position in positions:
        changed = bytearray(content)
        changed[position] ^= 0x55
        path.write_bytes(changed)
        try:
            read = read_demonstration(path, decode=True)
        except PolicyError:
            noticed += 1
        else:
            assert_same(original, read)
    assert noticed > 20


def test_a_file_that_is_not_there_or_not_hdf5_is_named(tmp_path):
    with pytest.raises(PolicyError, match=r"nothing\.hdf5"):
        read_demonstration(tmp_path / "nothing.hdf5")
    (tmp_path / "text.hdf5").write_text("hello")
    with pytest.raises(PolicyError, match=r"text\.hdf5"):
        read_demonstration(tmp_path / "text.hdf5")


def test_a_file_without_our_attributes_is_no_demonstration_of_ours(tmp_path):
    with h5py.File(tmp_path / "libero.hdf5", "w") as file:
        file.create_dataset("data/demo_0/actions", data=np.zeros((3, 7)))
    with pytest.raises(PolicyError, match=r"libero\.hdf5"):
        read_demonstration(tmp_path / "libero.hdf5")


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_the_old_one(make_demonstration, tmp_path):
    path, large = tmp_path / "demo.hdf5", tmp_path / "large.hdf5"
    write_demonstration(path, make_demonstration(steps=2))
    write_demonstration(large, make_demonstration(steps=200))
    before = path.read_bytes()
    code = f"""
import resource
from mllm.demonstrations import read_demonstration, write_demonstration
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    write_demonstration({str(path)!r}, read_demonstration({str(large)!r}))
except OSError as error:
    print(error)
"""
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert str(path) in result.stdout
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [path, large]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": np.zeros((STEPS, 6))}, "actions has shape"),
        ({"executed": np.zeros((STEPS + 1, 7))}, "executed has shape"),
        ({"targets": np.full((STEPS, 6), np.nan, np.float32)}, "targets holds"),
        ({"objects": {"plate": np.zeros((STEPS, 3))}}, "'plate' has shape"),
        ({"phases": np.full(STEPS, 3, np.int8)}, "phases are"),
        ({"outcome": "error"}, "outcome is 'error'"),
        ({"images": {"agentview": [b""] * 3}}, "3 images of camera 'agentview'"),
        ({"images": {"front": [b""] * STEPS}}, "'front'"),
        ({"proprio": {}}, "proprio has"),
    ],
)
def test_parts_that_do_not_fit_together_are_named(make_demonstration, changes, message):
    with pytest.raises(PolicyError, match=message):
        make_demonstration(**changes)


def test_an_unknown_image_format_is_refused(make_demonstration, tmp_path):
    with pytest.raises(PolicyError, match=r"'png'.*raw, webp"):
        write_demonstration(tmp_path / "demo.hdf5", make_demonstration(), images="png")


def test_files_of_a_folder_come_in_the_order_of_suite_task_and_seed(tmp_path):
    names = ["a/x/seed_00000002.hdf5", "a/x/seed_00000010.hdf5", "b/w/seed_00000001.hdf5"]
    for name in [*reversed(names), "a/x_demo.hdf5", "a/x/.seed_00000001.hdf5.7.tmp"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [str(path.relative_to(tmp_path)) for path in demonstration_files(tmp_path)] == names
