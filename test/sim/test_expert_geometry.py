"""Points and heights of small scenes whose answers are known."""

import math

import mujoco
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.expert.geometry import body_points, corridor, geoms_of, heading, heights, rotation_about_z, rotation_vector

SCENE = """
<mujoco><worldbody>
  <geom name="table" type="box" size="0.5 0.5 0.1" pos="0 0 -0.1" group="0"/>
  <body name="box" pos="0.1 0 0.03" euler="0 0 90">
    <geom name="box" type="box" size="0.02 0.04 0.03" group="0" rgba="1 1 1 0"/>
    <geom name="drawing" type="box" size="0.1 0.1 0.3" group="1"/>
    <body name="lid" pos="0 0 0.04"><geom name="lid" type="cylinder" size="0.01 0.01" group="0"/></body>
  </body>
  <body name="bare"/>
</worldbody></mujoco>
"""


@pytest.fixture
def scene() -> tuple[mujoco.MjModel, mujoco.MjData]:
    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


def test_points_span_a_body_and_what_hangs_on_it(scene) -> None:
    model, data = scene
    points = body_points(model, data, model.body("box").id)
    np.testing.assert_allclose(points.min(0), [0.06, -0.02, 0.0], atol=1e-9)
    np.testing.assert_allclose(points.max(0), [0.14, 0.02, 0.08], atol=1e-9)


def test_points_of_a_cylinder_lie_on_its_rims(scene) -> None:
    model, data = scene
    points = body_points(model, data, model.body("lid").id) - data.xpos[model.body("lid").id]
    np.testing.assert_allclose(np.hypot(points[:, 0], points[:, 1]), 0.01, atol=1e-9)
    np.testing.assert_allclose(np.abs(points[:, 2]), 0.01, atol=1e-9)


def test_a_body_without_collision_geometry_is_an_error(scene) -> None:
    model, data = scene
    with pytest.raises(ValueError, match="bare"):
        body_points(model, data, model.body("bare").id)


def test_heights_count_only_what_is_seen(scene) -> None:
    model, data = scene
    places = np.array([[0.1, 0.0], [0.13, 0.0], [0.3, 0.3], [2.0, 0.0]])
    box = geoms_of(model, model.body("box").id)
    np.testing.assert_allclose(heights(model, data, places, np.ones(model.ngeom, bool)), [0.08, 0.06, 0.0, -np.inf])
    np.testing.assert_allclose(heights(model, data, places, ~box), [0.0, 0.0, 0.0, -np.inf])
    np.testing.assert_allclose(heights(model, data, places, box), [0.08, 0.06, -np.inf, -np.inf])


def test_heights_leave_the_model_as_it_was(scene) -> None:
    model, data = scene
    groups, colours = model.geom_group.copy(), model.geom_rgba.copy()
    heights(model, data, np.zeros((3, 2)), np.zeros(model.ngeom, bool))
    np.testing.assert_array_equal(model.geom_group, groups)
    np.testing.assert_array_equal(model.geom_rgba, colours)


def test_a_corridor_leaves_no_gap() -> None:
    start, end, radius = np.array([0.1, 0.0]), np.array([0.3, 0.2]), 0.06
    places = corridor(start, end, radius)
    rng = np.random.default_rng(0)
    offsets = rng.normal(size=(200, 2))
    offsets *= radius * np.sqrt(rng.random((200, 1))) / np.linalg.norm(offsets, axis=1, keepdims=True)
    inside = start + rng.random((200, 1)) * (end - start) + offsets
    gaps = np.linalg.norm(inside[:, None] - places[None], axis=2).min(1)
    assert gaps.max() < 0.02


@given(st.floats(-3.1, 3.1))
def test_heading_and_rotation_vector_undo_a_turn_about_z(angle: float) -> None:
    rotation = rotation_about_z(angle)
    assert heading(rotation) == pytest.approx(angle, abs=1e-9)
    np.testing.assert_allclose(rotation_vector(rotation), [0, 0, angle], atol=1e-6)


def test_a_half_turn_has_a_rotation_vector_of_pi() -> None:
    assert np.linalg.norm(rotation_vector(np.diag([1.0, -1.0, -1.0]))) == pytest.approx(math.pi)
