"""The Gymnasium environment: its protocol, its errors, and what a reset forgets."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sim.bench import sample_actions
from sim.env import EnvConfig, LiberoEnv, openvla_view
from sim.errors import ConfigurationError, EnvironmentFault
from sim.tasks import find_task, item_of


def play(env: LiberoEnv, init_state: int | str, seed: int | None = None, steps: int = 4) -> np.ndarray:
    """Every state of an episode: (steps + 1, dim)."""
    env.reset(seed=seed, options={"init_state": init_state})
    states = [env.state()]
    for action in sample_actions(steps):
        env.step(action)
        states.append(env.state())
    return np.array(states)


def turn_on_the_stove(env: LiberoEnv) -> None:
    """Turns the knob as a hand would have, past the angle at which LIBERO calls the stove on."""
    privileged = env.privileged()
    joint = privileged.model.joint("flat_stove_1_button")
    privileged.data.qpos[joint.qposadr] = 2.0


def test_observations_lie_in_the_declared_space(env: LiberoEnv) -> None:
    observation, _ = env.reset()
    assert env.observation_space.contains(observation)
    observation, *_ = env.step(np.zeros(7, np.float32))
    assert env.observation_space.contains(observation)


def test_an_episode_does_not_depend_on_the_ones_before_it(env: LiberoEnv) -> None:
    first = play(env, 3)
    play(env, 8, seed=5)
    play(env, "sampled", seed=9)
    env.reset()
    turn_on_the_stove(env)
    env.step(np.ones(7))
    np.testing.assert_array_equal(play(env, 3), first)


def test_sampled_episodes_follow_their_seed(env: LiberoEnv) -> None:
    one, two, again = (play(env, "sampled", seed=seed) for seed in (1, 2, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one[0] - two[0]).max() > 1e-3


def test_the_seed_places_the_fixtures(env: LiberoEnv) -> None:
    privileged = env.privileged()
    body = privileged.body_ids["wooden_cabinet_1"]
    places = []
    for seed in (1, 2, 1):
        env.reset(seed=seed)
        places.append(privileged.model.body_pos[body].copy())
    np.testing.assert_array_equal(places[0], places[2])
    assert not np.array_equal(places[0], places[1])


def test_a_reset_leaves_numpy_s_global_generator_alone(env: LiberoEnv) -> None:
    np.random.seed(11)
    expected = np.random.rand()
    np.random.seed(11)
    env.reset(seed=3)
    assert np.random.rand() == expected


def test_reaching_the_goal_ends_the_episode_with_reward_one(env: LiberoEnv) -> None:
    env.reset()
    turn_on_the_stove(env)
    _, reward, terminated, truncated, info = env.step(np.zeros(7))
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
    privileged = env.privileged()
    assert privileged.goal == (("turnon", "flat_stove_1"),)
    assert privileged.holds(privileged.goal[0])
    with pytest.raises(ConfigurationError, match="call reset"):
        env.step(np.zeros(7))


def test_the_step_limit_truncates(env: LiberoEnv) -> None:
    env.reset()
    ends = [env.step(np.zeros(7))[2:4] for _ in range(5)]
    assert ends == [(False, False)] * 4 + [(False, True)]


def test_the_stamp_counts_simulated_time_from_the_first_observation(env: LiberoEnv) -> None:
    observation, _ = env.reset()
    assert env.observation_for_policy(observation).stamp == 0.0
    for _ in range(3):
        observation, *_ = env.step(np.zeros(7))
    assert env.observation_for_policy(observation).stamp == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("action", "complaint"),
    [
        (np.zeros(6), r"shape \(6,\)"),
        (np.array([0, 0, np.nan, 0, 0, 0, 0]), r"action\[2\] is nan"),
        (np.array([0, 0, 0, 0, 1.01, 0, 0]), r"action\[4\] is 1.01"),
    ],
)
def test_an_impossible_action_is_refused_by_value(env: LiberoEnv, action: np.ndarray, complaint: str) -> None:
    env.reset()
    with pytest.raises(ConfigurationError, match=complaint):
        env.step(action)


@pytest.mark.parametrize("init_state", [50, -1, True, "random", "shuffled", None])
def test_an_unknown_initial_state_is_refused(env: LiberoEnv, init_state: object) -> None:
    with pytest.raises(ConfigurationError, match=r"choose (0 to 49, )?'?sampled'? or '?shuffled"):
        env.reset(options={"init_state": init_state})


def test_an_unknown_reset_option_is_refused(env: LiberoEnv) -> None:
    with pytest.raises(ConfigurationError, match="'state'"):
        env.reset(options={"state": 1})


def test_a_diverged_simulation_is_a_fault(env: LiberoEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log where it stands
    env.reset()
    env.privileged().data.qvel[:] = 1e12
    with pytest.raises(EnvironmentFault, match="diverged in step 1"):
        env.step(np.zeros(7))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suite", "libero"),
        ("renderer", "best"),
        ("stepper", "quick"),
        ("image_size", 0),
        ("settle_steps", -1),
        ("step_limit", 0),
        ("seed", -1),
        ("gl", "glfw"),
        ("cameras", ("agentview", "agentview")),
    ],
)
def test_a_wrong_setting_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=str(value[0] if isinstance(value, tuple) else value)):
        EnvConfig(**{field: value})  # type: ignore[arg-type]


def test_intrinsics_project_the_optical_axis_to_the_centre(env: LiberoEnv) -> None:
    intrinsics = env.camera_info("agentview")
    np.testing.assert_array_equal(intrinsics @ [0, 0, 1], [127.5, 127.5, 1])
    fovy = env.privileged().model.camera("agentview").fovy[0]
    assert 2 * np.degrees(np.arctan2(128, intrinsics[1, 1])) == pytest.approx(fovy)


def test_openvla_s_view_is_the_raw_image_turned_by_half() -> None:
    raw = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    upright = raw[::-1]
    np.testing.assert_array_equal(openvla_view(upright), raw[::-1, ::-1])


def test_a_second_choice_of_opengl_library_is_refused(env: LiberoEnv) -> None:
    other = {"osmesa": "egl", "egl": "osmesa"}[env.provenance()["gl"]]
    with pytest.raises(ConfigurationError, match="start another process"):
        LiberoEnv(EnvConfig(gl=other))


def test_without_the_sim_extra_the_error_names_it() -> None:
    code = "import sys; sys.modules['libero'] = None\nfrom sim.tasks import find_task\nfind_task('libero_goal', 0)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'flashvla_ros[sim]'" in ran.stderr


def test_nothing_is_printed_while_an_environment_lives() -> None:
    code = (
        "from sim.env import EnvConfig, LiberoEnv\n"
        "env = LiberoEnv(EnvConfig(suite='libero_object', cameras=('agentview',), image_size=64))\n"
        "env.reset(); env.close()"
    )
    environment = {**os.environ, "MUJOCO_GL": "osmesa"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert json.dumps([ran.stdout, ran.stderr]) == json.dumps(["", ""])


@pytest.fixture(scope="module")
def objects() -> Iterator[LiberoEnv]:
    env = LiberoEnv(EnvConfig("libero_object", 0, cameras=()))
    yield env
    env.close()


def places(env: LiberoEnv, draw: str, seed: int) -> dict[str, np.ndarray]:
    """Object -> (3,) m."""
    env.reset(seed=seed, options={"init_state": draw})
    privileged = env.privileged()
    return {name: privileged.data.xpos[body].copy() for name, body in privileged.body_ids.items()}


def test_shuffled_objects_exchange_places_and_the_basket_stays(objects: LiberoEnv) -> None:
    before, after = places(objects, "sampled", 1), places(objects, "shuffled", 1)
    np.testing.assert_allclose(before.pop("basket_1"), after.pop("basket_1"), atol=2e-3)
    sampled, shuffled = np.array(list(before.values())), np.array(list(after.values()))
    apart = np.linalg.norm(sampled[:, None, :2] - shuffled[None, :, :2], axis=2)
    # A draw of its own: [1, 1, 0], as numpy has [1, 1], disturbs demonstrations of this task.
    expected = np.random.default_rng([1, 0, 0, 1]).permutation(len(sampled))
    np.testing.assert_array_equal(apart.argmin(0), expected)
    assert apart.min(0).max() < 0.02
    assert (np.diag(apart) > 0.05).sum() >= 2
    np.testing.assert_allclose(sampled[:, 2], shuffled[:, 2], atol=5e-3)


def test_a_shuffled_start_of_libero_spatial_asks_for_either_bowl_in_the_sampled_scene() -> None:
    env = LiberoEnv(EnvConfig("libero_spatial", 0, cameras=()))
    try:
        asked_for = {}
        for seed in range(6):
            sampled = places(env, "sampled", seed)
            for name, place in places(env, "shuffled", seed).items():
                np.testing.assert_allclose(place, sampled[name], atol=1e-9)
            ((_, bowl, plate),) = env.privileged().goal
            assert (bowl, plate) == (item_of(env.task), "plate_1")
            asked_for[bowl] = env.task.language
        assert asked_for == {
            "akita_black_bowl_1": find_task("libero_spatial", 0).language,
            "akita_black_bowl_2": find_task("libero_spatial", 1).language,
        }
    finally:
        env.close()


def test_a_shuffled_episode_asks_for_an_object_of_its_scene_and_the_next_official_one_for_its_own(
    objects: LiberoEnv,
) -> None:
    asked_for = set()
    for seed in range(6):
        places(objects, "shuffled", seed)
        ((_, item, _),) = objects.privileged().goal
        assert item == item_of(objects.task)
        assert item in objects.privileged().body_ids
        asked_for.add(item)
    assert len(asked_for) > 1
    objects.reset(options={"init_state": 0})
    assert objects.task == find_task("libero_object", 0)
    assert objects.privileged().goal[0][1] == "alphabet_soup_1"
