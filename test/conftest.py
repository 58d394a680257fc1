"""What the tests of several packages share: demonstrations made up, a model that is quick to train on some, a LLaVA.

`demonstrations` are of a world that is quick to learn: an image with a bright square, and actions that point at it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm.demonstrations import Demonstration, write_demonstration

PHASES = ("approach", "close", "lost")
CAMERAS = ("agentview", "robot0_eye_in_hand")


@pytest.fixture
def make_demonstration() -> Callable[..., Demonstration]:
    """make(steps, seed, size, **fields): random numbers, and images that differ in every quarter and frame."""
    return _make


def _make(steps: int = 5, seed: int = 0, size: int = 16, **changes: object) -> Demonstration:
    rng = np.random.default_rng(seed)
    quaternion = rng.normal(size=(steps, 4))
    smooth = rng.integers(0, 256, (steps, 2, 2, 3)).repeat(size // 2, 1).repeat(size // 2, 2).astype(np.uint8)
    demonstration = Demonstration(
        images={"agentview": smooth, "robot0_eye_in_hand": smooth[:, ::-1].copy()},
        proprio={
            "eef_pos": rng.normal(size=(steps, 3)),
            "eef_quat": quaternion / np.linalg.norm(quaternion, axis=1, keepdims=True),
            "gripper_qpos": rng.normal(size=(steps, 2)),
            "joint_pos": rng.normal(size=(steps, 7)),
        },
        actions=rng.uniform(-1, 1, (steps, 7)),
        executed=rng.uniform(-1, 1, (steps, 7)),
        states=rng.normal(size=(steps, 30)),
        targets=rng.normal(size=(steps, 6)).astype(np.float32),
        phases=(np.arange(steps) % 3).astype(np.int8),
        phase_names=("approach", "close", "lost"),
        instruction="put the bowl on the plate",
        suite="libero_goal",
        task=8,
        seed=seed,
        outcome="success",
        source="expert",
        objects={"black bowl": rng.uniform(size=(steps, 2, 2)).astype(np.float32)},
        env_args={"problem_name": "libero_tabletop_manipulation", "bddl_file": "libero_goal/x.bddl"},
        provenance={"mujoco": "3.3.2"},
    )
    return replace(demonstration, **changes)  # type: ignore[arg-type]


def _pointing(seed: int, steps: int = 12, source: str = "expert", size: int = 32) -> Demonstration:
    generator = np.random.default_rng(seed)
    place = generator.uniform(-1, 1, 2)
    images = np.full((steps, size, size, 3), 40, np.uint8)
    row, column = ((place + 1) / 2 * (size - 8)).astype(int)
    images[:, row : row + 8, column : column + 8] = (220, 30, 30)
    actions = np.zeros((steps, 7))
    actions[:, :2] = place
    actions[:, 6] = np.where(np.arange(steps) < steps // 2, -1, 1)
    proprio = {"eef_pos": 3, "eef_quat": 4, "gripper_qpos": 2, "joint_pos": 7}
    phases = np.where(np.arange(steps) < steps // 2, 0, 1).astype(np.int8)
    phases[3] = 2
    return Demonstration(
        images=dict.fromkeys(CAMERAS, images),
        proprio={name: generator.normal(size=(steps, width)) for name, width in proprio.items()},
        actions=actions,
        executed=actions,
        states=generator.normal(size=(steps, 5)),
        targets=np.tile(np.array([*place, 0, 0, 0, 0], np.float32) * 0.1, (steps, 1)),
        phases=phases,
        phase_names=PHASES,
        instruction="pick up the bowl",
        suite="libero_spatial",
        task=0,
        seed=seed,
        outcome="success",
        source=source,
        objects={"bowl": np.full((steps, 2, 2), (np.array([row, column]) + 4) / size, np.float32)},
        provenance={"renderer": "fast", "image_size": str(size)},
    )


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demonstrations")
    for seed in range(6):
        write_demonstration(folder / f"seed_{seed:08d}.hdf5", _pointing(seed), images="webp")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a few thousand random weights, to start runs from."""
    from mllm.checkpoint import save_checkpoint
    from mllm.config import DecoderConfig, ImageConfig, TowerConfig, VLAConfig
    from mllm.tokenizer import WordTokenizer
    from mllm.vla import VLA, init_random

    config = VLAConfig(
        towers=(TowerConfig("conv-vit", 32, 32, 1, 1, 64),),
        decoder=DecoderConfig(32, 64, 2, 2, 2, 512, 64),
        cameras=CAMERAS,
        vocab_padding=0,
        images=ImageConfig(mirror=False, jpeg=False, resize="area", centre_crop=False),
        gripper="command",
    )
    folder = tmp_path_factory.mktemp("tiny")
    save_checkpoint(folder, init_random(VLA(config), 0), WordTokenizer())
    return folder


@pytest.fixture(scope="session")
def tiny_diffusion(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` with a diffusion head, which draws chunks of three actions in four steps."""
    from dataclasses import replace

    from mllm.checkpoint import load_checkpoint, save_checkpoint
    from mllm.config import DiffusionConfig
    from mllm.vla import VLA, init_random

    loaded, tokenizer = load_checkpoint(tiny)
    small = DiffusionConfig(50, 4, width=16, depth=1)
    config = replace(loaded.config, decoding="slots", chunk=3, execute=2, head="diffusion", diffusion=small)
    folder = tmp_path_factory.mktemp("tiny_diffusion")
    save_checkpoint(folder, init_random(VLA(config), 1), tokenizer)
    return folder


@pytest.fixture(scope="session")
def their_llava(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A small random LLaVA of transformers' own, its processor, and the folder into which transformers saved both.

    28 pixels, 16 visual tokens, 4 layers, 96 positions; <image> is id 4 and the end 2, of 40.
    """
    import torch

    from mllm.torchvision_import import import_beside_torchvision

    transformers = import_beside_torchvision("transformers")
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=28, patch_size=7, **vision),
        text_config=transformers.LlamaConfig(
            num_key_value_heads=2, vocab_size=40, max_position_embeddings=96, pad_token_id=3, **text
        ),
        image_token_index=4,
        image_seq_length=16,
    )
    torch.manual_seed(3)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        scale = "norm" in name and name.endswith("weight")
        parameter.data.normal_(std=0.2).add_(1.0 if scale else 0.0)
    processor, folder = _llava_processor(transformers), tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, folder


def _llava_processor(transformers: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = (
        "<unk> <s> </s> <pad> <image> USER : ASSISTANT what is it on the table ? where red cube of soup and blue bowl"
    )
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words.split())}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        additional_special_tokens=["<image>"],
    )
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return transformers.LlavaProcessor(
        images, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
