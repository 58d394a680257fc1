"""Vision towers against timm itself, and the order in which two towers' features are fused."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from mllm.config import DINOV2, SIGLIP, DecoderConfig, TowerConfig, VLAConfig, mini, openvla_7b  # noqa: E402
from mllm.errors import PolicyError  # noqa: E402
from mllm.torchvision_import import import_timm  # noqa: E402
from mllm.vision import Projector, VisionBackbone, make_tower, patch_features  # noqa: E402
from mllm.vla import VLA  # noqa: E402

DINO = TowerConfig(DINOV2, 56, width=32, depth=3, heads=2)
SIG = TowerConfig(SIGLIP, 56, width=48, depth=4, heads=3)


@pytest.mark.parametrize("config", [DINO, SIG], ids=["dinov2", "siglip"])
@torch.no_grad()
def test_a_tower_answers_with_its_second_to_last_block(config):
    tower = make_tower(config, 1).eval()
    for parameter in tower.parameters():
        parameter.normal_(std=0.2)
    images = torch.randn(2, 1, 3, 56, 56)
    features = patch_features(tower, images)
    # Independent of the method we call: the blocks in turn, then the patches behind the prefix tokens.
    x = tower.norm_pre(tower._pos_embed(tower.patch_embed(images[:, 0])))
    for block in list(tower.blocks)[:-1]:
        x = block(x)
    assert features.shape == (2, 16, config.width)
    assert torch.equal(features, x[:, tower.num_prefix_tokens :])
    published = tower.get_intermediate_layers(images[:, 0], n={len(tower.blocks) - 2})
    assert torch.equal(features, published[0])


def test_the_published_towers_have_these_prefix_tokens():
    assert make_tower(DINO, 1).num_prefix_tokens == 5
    assert make_tower(SIG, 1).num_prefix_tokens == 0


@torch.no_grad()
def test_fused_features_put_the_first_tower_first_and_split_the_channels_in_that_order():
    config = VLAConfig((DINO, SIG), DecoderConfig(64, 96, 1, 2, 2, 400))
    backbone = VisionBackbone(config).eval()
    pixels = torch.randn(2, 1, 6, 56, 56)
    features = backbone(pixels)
    assert features.shape == (2, 16, 80)
    assert torch.equal(features[..., :32], patch_features(backbone.featurizer, pixels[:, :, :3]))
    assert torch.equal(features[..., 32:], patch_features(backbone.fused_featurizer, pixels[:, :, 3:]))


@torch.no_grad()
def test_cameras_follow_one_another():
    config = VLAConfig((SIG,), DecoderConfig(64, 96, 1, 2, 2, 400), cameras=("a", "b"))
    backbone = VisionBackbone(config).eval()
    pixels = torch.randn(2, 2, 3, 56, 56)
    both = backbone(pixels)
    assert torch.allclose(both[:, :16], backbone(pixels[:, :1]), atol=1e-6)
    assert torch.allclose(both[:, 16:], backbone(pixels[:, 1:]), atol=1e-6)


@torch.no_grad()
def test_our_own_tower_makes_64_tokens_a_camera_and_keeps_cameras_apart():
    tower = make_tower(mini().towers[0], 2).eval()
    images = torch.randn(1, 2, 3, 128, 128)
    features = patch_features(tower, images)
    assert features.shape == (1, 128, mini().towers[0].width)
    images[:, 1] += 1
    assert torch.equal(patch_features(tower, images)[:, :64], features[:, :64])


@torch.no_grad()
def test_the_projector_of_two_towers_has_three_layers_and_that_of_one_two():
    fused, single = Projector(2, 8, 12), Projector(1, 8, 12)
    assert [tuple(p.shape) for p in fused.parameters()] == [(32, 8), (32,), (12, 32), (12,), (12, 12), (12,)]
    assert [tuple(p.shape) for p in single.parameters()] == [(12, 8), (12,), (12, 12), (12,)]
    x, gelu = torch.randn(2, 3, 8), torch.nn.GELU()
    assert torch.equal(fused(x), fused.fc3(gelu(fused.fc2(gelu(fused.fc1(x))))))
    assert torch.equal(single(x), single.fc2(gelu(single.fc1(x))))


def test_the_published_model_has_its_published_sizes():
    with torch.device("meta"):
        model = VLA(openvla_7b())
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["vision_backbone.featurizer.pos_embed"] == (1, 256, 1024)
    assert shapes["vision_backbone.featurizer.reg_token"] == (1, 4, 1024)
    assert shapes["vision_backbone.fused_featurizer.pos_embed"] == (1, 256, 1152)
    assert shapes["projector.fc1.weight"] == (8704, 2176)
    assert shapes["language_model.lm_head.weight"] == (32064, 4096)
    # 7,541,237,184 is what the hub says of openvla/openvla-7b.
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_541_237_184


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (TowerConfig("no_such_model"), "timm cannot make tower 'no_such_model'"),
        (TowerConfig("resnet18"), "resnet18"),
        (TowerConfig(DINOV2, mlp_width=7), "give its width too"),
        (TowerConfig(DINOV2, 224, width=30, depth=2, heads=4), "timm cannot make tower"),
    ],
)
def test_a_tower_that_timm_cannot_make_is_an_error_naming_it(tower, message):
    with pytest.raises(PolicyError, match=message):
        make_tower(tower, 1)


@pytest.mark.parametrize("name", ["hf-hub:timm/vit_tiny", "local-dir:/tmp/x", "hf_hub:a/b", "vit tiny", "", "vit\n", 3])
def test_a_tower_s_name_is_no_place_to_fetch_it_from(name):
    with pytest.raises(PolicyError, match=r"TowerConfig.name is .*: it must name a timm model"):
        TowerConfig(name)


def test_timm_is_importable_beside_a_torch_whose_torchvision_has_no_operators():
    assert import_timm().__version__
