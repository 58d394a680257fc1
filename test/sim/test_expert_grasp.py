"""Grasps of simple objects on a table, and the action that takes the gripper there."""

import mujoco
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm.policy import ActionSpec
from sim.expert.geometry import geoms_of, rotation_about, rotation_about_z
from sim.expert.grasp import FINGERTIP, Grasp, Scene, find_grasp, stretches
from sim.expert.plan import make_plan, resting_height
from sim.expert.servo import FUNNEL_SLOPE, STEEP_SLOPE, clip_length, funnel, grip_axes, servo, top_down, turn_between

BOX = '<geom type="box" size="0.02 0.05 0.03" pos="0 0 0.03"/>'
CUP = "".join(
    f'<geom type="box" size="{size} 0.03" pos="{place} 0.03"/>'
    for size, place in (("0.06 0.003", "0 0.057"), ("0.06 0.003", "0 -0.057"),
                        ("0.003 0.06", "0.057 0"), ("0.003 0.06", "-0.057 0"))
)  # fmt: skip
SLAB = '<geom type="box" size="0.06 0.06 0.03" pos="0 0 0.03"/>'
BASE = np.array([-0.6, 0.0])


def on_table(item: str, neighbours: str = "", turn: float = 0.0) -> Scene:
    model = mujoco.MjModel.from_xml_string(
        f'<mujoco><worldbody><geom type="box" size="1 1 0.1" pos="0 0 -0.1"/>{neighbours}'
        f'<body name="item" euler="0 0 {turn}">{item}</body></worldbody></mujoco>'
    )
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    own = geoms_of(model, model.body("item").id)
    return Scene(model, data, model.body("item").id, own, ~own)


def grasp_of(scene: Scene) -> Grasp:
    found = find_grasp(scene, np.zeros(2), BASE, np.array([0.0, 0.0, 0.1]), container=False)
    assert found is not None
    return found


@pytest.mark.parametrize("turn", [0.0, 30.0])
def test_a_box_is_taken_across_its_narrow_side(turn: float) -> None:
    grasp = grasp_of(on_table(BOX, turn=turn))
    # Fingers close along y at yaw 0, and the box is narrow along x.
    closing = rotation_about_z(grasp.yaw - np.deg2rad(turn))[:2, 1]
    assert abs(closing[0]) > 0.99
    np.testing.assert_allclose(grasp.position[:2], 0.0, atol=0.003)
    assert grasp.width == pytest.approx(0.04, abs=0.006)


def test_a_hollow_object_is_taken_by_its_wall() -> None:
    grasp = grasp_of(on_table(CUP))
    assert np.abs(grasp.position[:2]).max() == pytest.approx(0.057, abs=0.003)
    assert grasp.width < 0.02
    assert grasp.position[2] - FINGERTIP > 0.0


def test_a_neighbour_moves_the_grasp_to_another_wall() -> None:
    free = grasp_of(on_table(CUP))
    x, y = free.position[:2] * 1.6
    blocked = grasp_of(on_table(CUP, f'<geom type="box" size="0.02 0.02 0.05" pos="{x} {y} 0.05"/>'))
    assert np.linalg.norm(blocked.position - free.position) > 0.03


def test_an_overhang_is_avoided_by_holding_the_wall_off_its_middle() -> None:
    # A board whose corner is over the cup, so that every hand across the cup's middle would hit it.
    under = grasp_of(on_table(CUP, '<geom type="box" size="0.1 0.1 0.02" pos="0.1 0.11 0.15"/>'))
    assert under.intrusion < 0.02
    lateral = rotation_about_z(under.yaw)[:2, 0]
    assert abs(lateral @ under.position[:2]) > 0.02


def test_a_post_between_the_middle_and_the_edge_of_the_palm_is_in_the_way() -> None:
    free = grasp_of(on_table(CUP))
    lateral, closing = rotation_about_z(free.yaw)[:2, :2].T
    x, y = free.position[:2] - 0.08 * closing + 0.0175 * lateral
    among = grasp_of(on_table(CUP, f'<geom type="box" size="0.01 0.01 0.1" pos="{x} {y} 0.1"/>'))
    assert abs(among.yaw - free.yaw) + np.linalg.norm(among.position - free.position) > 0.03
    assert among.intrusion < 0.005


def test_the_way_down_is_steep_beside_what_is_taller_than_the_hand() -> None:
    def slope(neighbour: str) -> float:
        plan = make_plan(on_table(BOX, neighbour), np.zeros(2), BASE, np.array([0.4, 0.0, 0.0]), container=False)
        assert plan is not None
        return plan.slope

    assert slope("") == FUNNEL_SLOPE
    assert slope('<geom type="box" size="0.1 0.01 0.02" pos="0 0.07 0.02"/>') == FUNNEL_SLOPE
    assert slope('<geom type="box" size="0.1 0.01 0.2" pos="0 0.07 0.2"/>') == STEEP_SLOPE


def test_what_is_wider_than_the_gripper_has_no_grasp() -> None:
    assert find_grasp(on_table(SLAB), np.zeros(2), BASE, np.zeros(3), container=False) is None


def test_an_object_comes_to_rest_on_the_highest_thing_below_it() -> None:
    scene = on_table(BOX, '<geom type="box" size="0.01 0.01 0.02" pos="0.32 0.25 0.02"/>')
    corners = np.array([[x, y, 0.0] for x in (-0.02, 0.02) for y in (-0.05, 0.05)])
    assert resting_height(scene, corners, np.array([-0.3, 0.2])) == pytest.approx(0.0)
    assert resting_height(scene, corners, np.array([0.3, 0.2])) == pytest.approx(0.04)


def test_stretches_are_the_ranges_above_a_level() -> None:
    assert stretches(np.array([2.0, 0.0, 2.0, 2.0, -np.inf, 2.0]), 1.0) == [(0, 1), (2, 4), (5, 6)]
    assert stretches(np.zeros(3), 1.0) == []


vectors = st.lists(st.floats(-10, 10), min_size=3, max_size=3).map(np.array)


@given(vectors)
def test_clipping_keeps_the_direction(vector: np.ndarray) -> None:
    clipped = clip_length(vector)
    assert np.abs(clipped).max() <= 1.0 + 1e-12
    np.testing.assert_allclose(np.cross(clipped, vector), 0.0, atol=1e-9)
    assert clipped @ vector >= 0


@given(vectors, vectors, st.booleans())
def test_an_action_is_always_valid(offset: np.ndarray, turn: np.ndarray, close: bool) -> None:
    action = servo(offset, turn, close, ActionSpec())
    assert action.shape == (7,)
    assert action.dtype == np.float32
    assert np.abs(action).max() <= 1.0
    assert action[6] == (1.0 if close else -1.0)


@given(st.floats(-1.5, 1.5))
def test_a_gripper_that_is_turned_right_need_not_turn(yaw: float) -> None:
    np.testing.assert_allclose(turn_between(top_down(yaw), top_down(yaw)), 0.0, atol=1e-6)
    np.testing.assert_allclose(turn_between(top_down(0.0), top_down(yaw)), [0, 0, yaw], atol=1e-6)


def test_the_axes_of_a_grip_are_a_rotation_that_points_and_closes_as_asked() -> None:
    forward, closing = np.array([0.0, -0.6, -0.8]), np.array([1.0, 0.0, 0.0])
    axes = grip_axes(forward, closing)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)
    assert np.linalg.det(axes) == pytest.approx(1.0)
    np.testing.assert_allclose(axes[:, 2], forward)
    np.testing.assert_allclose(axes[:, 0], closing)


def test_the_funnel_comes_down_only_over_its_goal() -> None:
    goal = np.array([0.5, 0.0, 0.1])
    np.testing.assert_allclose(funnel(goal, goal, 0.4), goal)
    np.testing.assert_allclose(funnel(np.array([0.0, 0.0, 0.4]), goal, 0.4), [0.5, 0.0, 0.4])
    # From beside the goal it rises, and only then moves across.
    np.testing.assert_allclose(funnel(np.array([0.0, 0.0, 0.1]), goal, 0.4), [0.0, 0.0, 0.4])


@given(vectors)
def test_a_steep_funnel_is_never_lower(position: np.ndarray) -> None:
    goal, position = np.array([0.5, 0.0, 0.1]), position / 10
    assert funnel(position, goal, 0.4, slope=STEEP_SLOPE)[2] >= funnel(position, goal, 0.4)[2]


@given(vectors, vectors, st.floats(0.0, 0.5))
def test_the_funnel_is_the_same_whichever_way_it_points(position: np.ndarray, goal: np.ndarray, rise: float) -> None:
    turned = rotation_about(np.array([0.6, 0.0, 0.8]), 1.1)
    axis = turned[:, 2]
    sideways = funnel(turned @ position, turned @ goal, goal[2] + rise, axis=axis)
    np.testing.assert_allclose(sideways, turned @ funnel(position, goal, goal[2] + rise), atol=1e-9)


@given(vectors, st.integers(0, 2))
def test_the_funnel_is_continuous(position: np.ndarray, axis: int) -> None:
    goal, step = np.array([0.5, 0.0, 0.1]), 1e-6 * np.eye(3)[axis]
    position = position / 10
    change = funnel(position + step, goal, 0.4) - funnel(position, goal, 0.4)
    assert np.abs(change).max() < 1e-3
