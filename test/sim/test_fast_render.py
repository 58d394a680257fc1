"""The fast renderer against plainly drawing everything at the same settings, pixel by pixel."""

import time
from collections.abc import Iterator

import numpy as np
import pytest

from sim.bench import sample_actions
from sim.fast_render import FastRenderer
from sim.render import OfficialRenderer
from sim.stepping import FastStepper
from sim.tasks import find_task, load_init_states
from sim.world import World

SIZE = 96
CAMERAS = ("agentview", "robot0_eye_in_hand")


class Scene:
    """A stove, a cabinet, a rack and objects, seen by one renderer with its savings and one without."""

    def __init__(self) -> None:
        self.world = World(find_task("libero_goal", "turn on the stove"))
        self.fast = self.renderer()
        self.plain = self.renderer()
        self.plain.cull = self.plain.layered = False
        self.step = FastStepper(self.world).step

    def renderer(self) -> FastRenderer:
        return FastRenderer(self.world.model, self.world.data, self.world.gl)

    def reset(self, seed: int = 0) -> None:
        self.world.reset(seed, load_init_states(self.world.task)[0])
        for _ in range(10):
            self.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))

    def check(self, camera: str) -> np.ndarray:
        number = self.world.camera(camera)
        fast = self.fast.render(number, SIZE)
        np.testing.assert_array_equal(fast, self.plain.render(number, SIZE))
        return fast

    def still_layers(self) -> int:
        return sum(bool(layer.members.any()) for layer in self.fast._layers.values())


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.fast.close()
    made.plain.close()
    made.world.close()


@pytest.mark.parametrize("camera", CAMERAS)
def test_a_moving_robot_is_drawn_exactly(scene: Scene, camera: str) -> None:
    scene.reset()
    frames = []
    for action in sample_actions(40).astype(np.float64):
        scene.step(action)
        frames.append(scene.check(camera))
    assert not np.array_equal(frames[0], frames[-1])
    assert scene.still_layers() == 1  # of the camera that stands still


def test_an_object_that_jumps_and_rests_again_is_drawn_exactly(scene: Scene) -> None:
    scene.reset()
    data = scene.world.data
    place = int(scene.world.model.joint("plate_1_joint0").qposadr[0])
    frames = []
    for frame in range(12):
        if frame in (4, 5, 8):
            data.qpos[place] += 0.05
        scene.world.domain.sim.forward()
        frames.append(scene.check("agentview"))
    assert not np.array_equal(frames[3], frames[4])
    assert np.array_equal(frames[6], frames[7])


def test_an_object_behind_glass_is_drawn_exactly(scene: Scene) -> None:
    scene.reset()
    model, data = scene.world.model, scene.world.data
    for _ in range(3):
        scene.check("agentview")
    (layer,) = scene.fast._layers.values()
    assert layer.glazed is not None  # the wine rack has a pane
    rack = scene.world.privileged().body_ids["wine_rack_1"]
    place = int(model.joint("plate_1_joint0").qposadr[0])
    toward_camera = np.array([1.0, 0, 1.0])
    for distance in (-0.1, 0.0, 0.05, 0.2):
        data.qpos[place : place + 3] = model.body_pos[rack] + [0, 0, 0.1] + distance * toward_camera
        scene.world.domain.sim.forward()
        covered = scene.check("agentview")
        assert not np.array_equal(covered, layer.image)


def test_fixtures_that_a_reset_moves_are_drawn_exactly(scene: Scene) -> None:
    frames = []
    for seed in (1, 2):
        scene.reset(seed)
        frames += [scene.check("agentview") for _ in range(3)]
    assert not np.array_equal(frames[0], frames[3])


def test_a_burner_that_lights_up_is_drawn_exactly(scene: Scene) -> None:
    scene.reset()
    off = [scene.check("agentview") for _ in range(3)][-1]
    scene.world.data.qpos[scene.world.model.joint("flat_stove_1_button").qposadr] = 2.0
    scene.step(np.zeros(7))
    assert scene.world.success()
    rgba = scene.world.model.site_rgba[scene.world.model.site("flat_stove_1_burner").id]
    assert rgba[3] > 0
    on = [scene.check("agentview") for _ in range(3)][-1]
    red = on.astype(int)[..., 0] - off.astype(int)[..., 0]
    assert red.max() > 50


def test_the_model_is_left_as_it_was(scene: Scene) -> None:
    model = scene.world.model
    before = model.geom_group.copy(), model.site_group.copy(), model.vis.quality.offsamples
    scene.check("agentview")
    np.testing.assert_array_equal(model.geom_group, before[0])
    np.testing.assert_array_equal(model.site_group, before[1])
    assert model.vis.quality.offsamples == before[2]


def test_a_larger_image_than_the_context_has_room_for_is_drawn(scene: Scene) -> None:
    image = scene.renderer()
    assert image.render(scene.world.camera("agentview"), 700).shape == (700, 700, 3)
    image.close()


def test_two_views_take_at_most_a_quarter_of_the_official_cpu_time(scene: Scene) -> None:
    official = OfficialRenderer(scene.world.model, scene.world.data, scene.world.gl)
    spent = {"official": 0.0, "fast": 0.0}
    scene.reset()
    for action in sample_actions(12).astype(np.float64):
        scene.step(action)
        for name, renderer in (("official", official), ("fast", scene.fast)):
            started = time.process_time()
            for camera in CAMERAS:
                renderer.render(scene.world.camera(camera), 128)
            spent[name] += time.process_time() - started
    official.close()
    assert spent["fast"] <= 0.25 * spent["official"]


def test_renderers_of_two_scenes_do_not_disturb_each_other(scene: Scene) -> None:
    scene.reset()
    before = scene.check("agentview")
    other = World(find_task("libero_object", 0))
    other.reset(0)
    renderer = OfficialRenderer(other.model, other.data, other.gl)
    alone = renderer.render(other.camera("agentview"), SIZE)
    np.testing.assert_array_equal(scene.check("agentview"), before)
    np.testing.assert_array_equal(renderer.render(other.camera("agentview"), SIZE), alone)
    renderer.close()
    other.close()
    np.testing.assert_array_equal(scene.check("agentview"), before)
