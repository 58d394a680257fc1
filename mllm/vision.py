"""Vision towers and projector, from images to visual tokens: OpenVLA's `vision_backbone` and `projector`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.config import OWN_TOWER, TowerConfig, VLAConfig
from mllm.convvit import ConvViT
from mllm.errors import PolicyError
from mllm.kernels import Linear
from mllm.torchvision_import import import_timm


def make_tower(config: TowerConfig, cameras: int) -> nn.Module:
    """A tower with random weights; `patch_features` runs it. Raises PolicyError: timm has no such transformer."""
    if config.name == OWN_TOWER:
        return ConvViT(config, cameras)
    timm = import_timm()
    options: dict[str, float] = {"embed_dim": config.width, "depth": config.depth, "num_heads": config.heads}
    if config.mlp_width:
        if not config.width:
            raise PolicyError(f"tower '{config.name}' has a mlp_width of {config.mlp_width}: give its width too")
        options["mlp_ratio"] = config.mlp_width / config.width
    given = {name: value for name, value in options.items() if value}
    try:
        tower = timm.create_model(config.name, pretrained=False, num_classes=0, img_size=config.image_size, **given)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise PolicyError(f"timm cannot make tower '{config.name}' with {given or 'its own sizes'}: {error}") from error
    if not hasattr(tower, "forward_intermediates") or not hasattr(tower, "blocks") or len(tower.blocks) < 2:
        raise PolicyError(f"timm's '{config.name}' is not a vision transformer of two blocks or more")
    return tower


def patch_features(tower: nn.Module, images: Tensor) -> Tensor:
    """images: (B, cameras, 3, S, S), normalised. Returns (B, cameras * patches, width).

    A timm tower answers with its second-to-last block's patches, not normalised, without class and register tokens,
    as OpenVLA takes them; its last block is not run. Ours answers with its own last block.
    """
    if isinstance(tower, ConvViT):
        return tower(images)
    batch = images.shape[0]
    features = tower.forward_intermediates(  # type: ignore[operator]
        images.flatten(0, 1),
        indices=[len(tower.blocks) - 2],  # type: ignore[arg-type]
        output_fmt="NLC",
        intermediates_only=True,
        stop_early=True,
    )[0]
    return features.reshape(batch, -1, features.shape[-1])


def patch_count(tower: nn.Module) -> int:
    """Visual tokens that the tower makes of an image."""
    return tower.patches if isinstance(tower, ConvViT) else tower.patch_embed.num_patches  # type: ignore


class VisionBackbone(nn.Module):
    """One or two towers; the features of a patch stand side by side, the first tower's first."""

    def __init__(self, config: VLAConfig) -> None:
        super().__init__()
        self.featurizer = make_tower(config.towers[0], len(config.cameras))
        self.fused_featurizer = make_tower(config.towers[1], len(config.cameras)) if len(config.towers) > 1 else None
        towers = [self.featurizer, *([self.fused_featurizer] if self.fused_featurizer is not None else [])]
        self.width: int = sum(tower.embed_dim for tower in towers)  # type: ignore[misc]
        self.tokens = len(config.cameras) * patch_count(self.featurizer)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (B, cameras, 3 * towers, S, S), each tower's normalisation stacked on the channels.

        Returns (B, cameras * patches, width).
        """
        if self.fused_featurizer is None:
            return patch_features(self.featurizer, pixels)
        first, second = pixels.split(3, dim=2)
        return torch.cat((patch_features(self.featurizer, first), patch_features(self.fused_featurizer, second)), -1)


@torch.no_grad()
def compute_buffers(backbone: VisionBackbone, config: VLAConfig) -> None:
    """Fills, in a backbone that was made without memory, what no file has: timm's rotary tables, for instance."""
    saved, cameras = set(backbone.state_dict()), len(config.cameras)
    for place, tower in zip(("featurizer", "fused_featurizer"), config.towers, strict=False):
        buffers = backbone.get_submodule(place).named_buffers(remove_duplicate=False)
        unsaved = {name: buffer for name, buffer in buffers if f"{place}.{name}" not in saved}
        made = dict(make_tower(tower, cameras).named_buffers(remove_duplicate=False)) if unsaved else {}
        for name, buffer in unsaved.items():
            buffer.copy_(made[name])


class Projector(nn.Module):
    """Visual features to embeddings: two layers for one tower, three for two (OpenVLA's "fused-gelu-mlp")."""

    def __init__(self, towers: int, width: int, hidden: int) -> None:
        super().__init__()
        inner = hidden if towers == 1 else 4 * width
        self.fc1 = Linear(width, inner)
        self.fc2 = Linear(inner, hidden)
        self.fc3 = Linear(hidden, hidden) if towers > 1 else None

    def forward(self, features: Tensor) -> Tensor:
        """features: (B, N, width). Returns (B, N, hidden)."""
        projected = self.fc2(F.gelu(self.fc1(features)))
        return projected if self.fc3 is None else self.fc3(F.gelu(projected))
