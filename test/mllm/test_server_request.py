"""Both layouts of an observation, and what a message is told that has neither."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm.server_request import RequestError, quaternion, read_request

IMAGE = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


def test_our_layout_becomes_the_observation_as_it_is():
    proprio = {"eef_pos": np.arange(3.0), "joint_pos": [1, 2.5]}
    request = read_request({"images": {"front": IMAGE}, "proprio": proprio, "stamp": 1.5, "prompt": "pick"})
    assert (request.prompt, request.reset, request.observation.stamp) == ("pick", False, 1.5)
    assert request.observation.images["front"] is IMAGE
    np.testing.assert_array_equal(request.observation.proprio["eef_pos"], [0, 1, 2])
    np.testing.assert_array_equal(request.observation.proprio["joint_pos"], [1, 2.5])


def test_images_alone_are_an_observation():
    request = read_request({"images": {"front": IMAGE}})
    assert (request.prompt, request.observation.proprio, request.observation.stamp) == (None, {}, 0.0)


def test_liberos_layout_becomes_upright_images_and_named_proprioception():
    raw, wrist_raw = IMAGE, IMAGE + 100  # bottom-up, as the simulator renders
    state = np.array([0.1, 0.2, 0.3, 0, 0, np.pi / 2, 0.04, -0.04], np.float32)
    message = {
        "observation/image": np.ascontiguousarray(raw[::-1, ::-1]),
        "observation/wrist_image": np.ascontiguousarray(wrist_raw[::-1, ::-1]),
        "observation/state": state,
        "prompt": "pick",
    }
    observation = read_request(message).observation
    np.testing.assert_array_equal(observation.images["agentview"], raw[::-1])
    np.testing.assert_array_equal(observation.images["robot0_eye_in_hand"], wrist_raw[::-1])
    np.testing.assert_allclose(observation.proprio["eef_pos"], [0.1, 0.2, 0.3], rtol=1e-6)
    np.testing.assert_allclose(observation.proprio["eef_quat"], [0, 0, 0.5**0.5, 0.5**0.5], atol=1e-6)
    np.testing.assert_allclose(observation.proprio["gripper_qpos"], [0.04, -0.04], rtol=1e-6)
    assert all(vector.dtype == np.float64 for vector in observation.proprio.values())


def test_liberos_wrist_image_and_state_may_be_missing():
    observation = read_request({"observation/image": IMAGE}).observation
    assert (list(observation.images), observation.proprio) == (["agentview"], {})


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3), st.floats(0, np.pi))
def test_an_axis_angle_becomes_the_quaternion_of_the_same_rotation(axis, angle):
    norm = np.linalg.norm(axis)
    axis = np.array(axis) / norm if norm > 1e-3 else np.array([0, 0, 1.0])
    expected = np.append(axis * np.sin(angle / 2), np.cos(angle / 2))
    np.testing.assert_allclose(quaternion(axis * angle), expected, atol=1e-12)


@pytest.mark.parametrize(("message", "prompt"), [({"reset": True}, None), ({"reset": True, "prompt": "pick"}, "pick")])
def test_a_reset_needs_no_observation(message, prompt):
    request = read_request(message)
    assert (request.observation, request.prompt, request.reset) == (None, prompt, True)


def test_a_reset_may_come_with_an_observation():
    request = read_request({"reset": True, "images": {"front": IMAGE}})
    assert request.reset
    assert request.observation is not None


def test_keys_that_it_does_not_know_are_ignored():
    assert read_request({"images": {"front": IMAGE}, "episode": "7", b"x": 1}).observation is not None


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({}, "keys: none"),
        ({"prompt": "pick", "image": 1}, "keys: 'image', 'prompt'"),
        ({"reset": False}, "no observation"),
        ({"reset": 1}, "'reset' is a int"),
        ({"images": {"front": IMAGE}, "prompt": b"pick"}, "'prompt' is a bytes"),
        ({"images": {}}, "'images' is empty"),
        ({"images": IMAGE}, "'images' is not a map"),
        ({"images": {b"front": IMAGE}}, "'images' is not a map with names"),
        ({"images": {"front": [[[0, 0, 0]]]}}, "'images.front' is a list"),
        ({"images": {"front": IMAGE.astype(np.float32)}}, r"\(2, 3, 3\) and dtype float32: it must be \(H, W, 3\)"),
        ({"images": {"front": IMAGE[:0]}}, "it must be"),
        ({"images": {"front": IMAGE[..., 0]}}, "it must be"),
        ({"images": {"front": IMAGE}, "proprio": [1]}, "'proprio' is not a map"),
        ({"images": {"front": IMAGE}, "proprio": {"q": "1.0"}}, "'proprio.q' is not a vector"),
        ({"images": {"front": IMAGE}, "proprio": {"q": [[1.0]]}}, "'proprio.q' is not a vector"),
        ({"images": {"front": IMAGE}, "proprio": {"q": np.array(["1"])}}, "'proprio.q' is not a vector"),
        ({"images": {"front": IMAGE}, "proprio": {"q": np.array([np.nan])}}, "not finite"),
        ({"images": {"front": IMAGE}, "stamp": float("inf")}, "'stamp'"),
        ({"images": {"front": IMAGE}, "stamp": "now"}, "'stamp'"),
        ({"observation/state": np.zeros(8)}, "'observation/image' is missing"),
        ({"observation/image": IMAGE, "observation/state": np.zeros(7)}, "has 7 numbers: it must have 8"),
    ],
)
def test_what_is_wrong_with_a_message_is_said(message, complaint):
    with pytest.raises(RequestError, match=complaint):
        read_request(message)
