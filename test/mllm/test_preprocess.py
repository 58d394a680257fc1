"""Image preprocessing against Pillow, torchvision's arithmetic and the published definitions."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image

from mllm.config import ImageConfig, VLAConfig, mini, openvla_7b
from mllm.errors import PolicyError
from mllm.preprocess import Preprocess, centre_crop, jpeg_round_trip, resize


def scene(height=256, width=256, seed=0):
    """A picture with edges, a gradient and some texture, (H, W, 3) uint8."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([x * 200 / width, y * 200 / height, (x + y) % 97 + 60], -1)
    image[height // 4 : height // 2, width // 3 : width // 2] = (220, 30, 40)
    return np.clip(image + generator.normal(0, 4, image.shape), 0, 255).astype(np.uint8)


def lanczos_weights(size, wanted):
    """(wanted, size) float64: Lanczos with three lobes, widened to the scale, as Pillow and TensorFlow define it."""
    scale = size / wanted
    distance = (np.arange(size)[None] + 0.5 - (np.arange(wanted)[:, None] + 0.5) * scale) / max(scale, 1)
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    return weights / weights.sum(1, keepdims=True)


def test_resizing_is_pillows_to_the_last_bit_and_the_exact_filter_within_one_level():
    image = scene()
    ours = resize(image, 224, "lanczos")
    assert np.array_equal(ours, np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.LANCZOS)))
    weights = lanczos_weights(256, 224)
    exact = np.einsum("ih,hwc,jw->ijc", weights, image.astype(np.float64), weights, optimize=True)
    assert np.abs(ours - np.clip(np.round(exact), 0, 255)).max() <= 1


def test_an_image_of_the_right_size_is_not_resized():
    image = scene(224, 224)
    assert resize(image, 224, "lanczos") is image
    assert resize(image, 224, "area") is image


def test_area_halves_an_image_by_averaging_four_pixels():
    image = scene()
    mean = image.reshape(128, 2, 128, 2, 3).astype(np.float64).mean((1, 3))
    assert np.abs(resize(image, 128, "area") - mean).max() <= 0.5


def test_the_centre_crop_is_bilinear_between_corners_within_one_level():
    image = scene(224, 224)
    side = math.sqrt(0.9)
    places = (1 - side) / 2 * 223 + np.arange(224) * side
    first = np.floor(places).astype(int)
    share = places - first
    exact = np.zeros((224, 224, 3))
    for dy, wy in ((0, 1 - share), (1, share)):
        for dx, wx in ((0, 1 - share), (1, share)):
            exact += (
                image[np.minimum(first + dy, 223)][:, np.minimum(first + dx, 223)] * wy[:, None, None] * wx[:, None]
            )
    # TensorFlow's way back to uint8 scales by 255.5 and cuts, where Pillow would scale by 255 and round.
    cut = np.floor(exact * 255.5 / 255)
    assert np.abs(centre_crop(image) - cut).max() <= 1
    assert (centre_crop(image) != cut).mean() < 1e-3
    assert np.abs(centre_crop(image) - exact).max() < 1
    assert np.array_equal(centre_crop(image, 1.0), image)


def test_the_jpeg_round_trip_is_pillows():
    image = scene()
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    assert np.array_equal(jpeg_round_trip(image), np.asarray(Image.open(buffer)))


def test_normalisation_is_torchvisions_to_the_last_bit_and_stacks_the_towers():
    torch = pytest.importorskip("torch")
    config = openvla_7b()
    preprocess = Preprocess(config)
    image = scene()
    pixels = preprocess({"agentview": image})
    assert pixels.shape == (1, 6, 224, 224)
    assert pixels.dtype == np.float32
    seen = torch.from_numpy(preprocess.view(image).copy()).permute(2, 0, 1).float().div(255)
    for tower, planes in zip(config.towers, (pixels[0, :3], pixels[0, 3:]), strict=True):
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (tower.mean, tower.std))
        assert np.array_equal(planes, seen.sub(mean).div(std).numpy())


def test_the_steps_come_in_openvlas_order():
    image = scene()
    step = resize(jpeg_round_trip(image[:, ::-1]), 224, "lanczos")
    assert np.array_equal(Preprocess(openvla_7b()).view(image), centre_crop(step))
    plain = VLAConfig(openvla_7b().towers, openvla_7b().decoder, images=ImageConfig(False, False, "lanczos", False))
    assert np.array_equal(Preprocess(plain).view(image), resize(image, 224, "lanczos"))


def test_the_mini_sees_its_cameras_in_their_order():
    config = mini()
    images = {"robot0_eye_in_hand": scene(seed=2), "agentview": scene(seed=1), "unused": scene()}
    pixels = Preprocess(config)(images)
    assert pixels.shape == (2, 3, 128, 128)
    red = resize(images["agentview"], 128, "area")[..., 0]
    assert np.allclose(pixels[0, 0], red / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3)), r"gave \(4, 4, 3\) float64"),
        (np.zeros((4, 4), np.uint8), r"gave \(4, 4\) uint8"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        ("picture", "gave str"),
    ],
)
def test_what_is_no_image_is_an_error_naming_the_camera(image, message):
    with pytest.raises(PolicyError, match=f"camera 'agentview' {message}|camera 'agentview'.*{message}"):
        Preprocess(openvla_7b())({"agentview": image})


def test_a_missing_camera_is_an_error_naming_it():
    with pytest.raises(PolicyError, match="lacks camera 'agentview'; it has front"):
        Preprocess(mini())({"front": scene()})
