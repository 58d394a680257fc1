"""A synthetic checkpoint under OpenVLA's published names, against an independent forward pass written out here.

The reference uses timm's towers, transformers' LlamaForCausalLM and the published order of things: it shares no code
with ours but the tokenizer's ids.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mllm.torchvision_import import import_timm  # noqa: E402

timm = import_timm()

from safetensors.torch import save_file  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from mllm.checkpoint import load_checkpoint  # noqa: E402
from mllm.config import DINOV2, SIGLIP  # noqa: E402
from mllm.generate import ActionDecoder  # noqa: E402
from mllm.vla import VLA  # noqa: E402
from mllm.vla_policy import VLAPolicy, make_example  # noqa: E402

PIXELS, WORDS, VOCAB, PADDING = 56, 9, 600, 64
TOWERS = ((DINOV2, 32, 3, 2), (SIGLIP, 48, 4, 3))
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}


class Reference:
    """The published computation, part by part."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.towers = [
            timm.create_model(
                name, pretrained=False, num_classes=0, img_size=PIXELS, embed_dim=width, depth=depth, num_heads=heads
            ).eval()
            for name, width, depth, heads in TOWERS
        ]
        self.llama = LlamaForCausalLM(LlamaConfig(**LLAMA, pad_token_id=0)).eval()
        vision = 80
        self.fc1, self.fc2, self.fc3 = (
            torch.nn.Linear(a, b) for a, b in ((vision, 4 * vision), (4 * vision, 64), (64, 64))
        )
        for module in (*self.towers, self.llama, self.fc1, self.fc2, self.fc3):
            for name, parameter in module.named_parameters():
                parameter.data.normal_(std=0.1)
                if "norm" in name and name.endswith("weight"):
                    parameter.data.add_(1)
        for name, parameter in self.towers[0].named_parameters():
            if "gamma" in name:
                parameter.data.normal_(1, 0.3)

    def tensors(self):
        """Every weight under its published name."""
        named = {}
        for prefix, tower in zip(("featurizer", "fused_featurizer"), self.towers, strict=True):
            for name, tensor in tower.state_dict().items():
                named[f"vision_backbone.{prefix}.{name.replace('.gamma', '.scale_factor')}"] = tensor
        for name in ("fc1", "fc2", "fc3"):
            for key, tensor in getattr(self, name).state_dict().items():
                named[f"projector.{name}.{key}"] = tensor
        for name, tensor in self.llama.state_dict().items():
            named[f"language_model.{name}"] = tensor
        return {name: tensor.contiguous() for name, tensor in named.items()}

    def visual(self, pixels):
        features = [
            tower.get_intermediate_layers(part, n={len(tower.blocks) - 2})[0]
            for tower, part in zip(self.towers, pixels.split(3, 1), strict=True)
        ]
        gelu = torch.nn.functional.gelu
        return self.fc3(gelu(self.fc2(gelu(self.fc1(torch.cat(features, 2))))))

    @torch.no_grad()
    def embedded(self, pixels, ids):
        words = self.llama.get_input_embeddings()(torch.tensor([ids]))
        return torch.cat([words[:, :1], self.visual(pixels), words[:, 1:]], 1)

    @torch.no_grad()
    def greedy(self, pixels, ids, allowed, count=7):
        """The whole sequence anew for every token: no cache."""
        sequence, tokens = self.embedded(pixels, ids), []
        for _ in range(count):
            logits = self.llama(inputs_embeds=sequence).logits[0, -1]
            tokens.append(int(logits[allowed[0] : allowed[1]].argmax()) + allowed[0])
            embedding = self.llama.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
            sequence = torch.cat([sequence, embedding], 1)
        return tokens


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(reference, folder of its checkpoint)."""
    reference, folder = Reference(5), tmp_path_factory.mktemp("openvla")
    tensors = reference.tensors()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "words.json").write_text(json.dumps(["pick", "up", "the", "bowl"]))
    towers = [
        {"name": name, "image_size": PIXELS, "width": width, "depth": depth, "heads": heads}
        for name, width, depth, heads in TOWERS
    ]
    config = {
        "model_type": "openvla",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "n_action_bins": 256,
        "pad_to_multiple_of": PADDING,
        "text_config": {"model_type": "llama", **LLAMA},
        "norm_stats": {
            "libero_spatial_no_noops": {
                "action": {"q01": [-0.5] * 6 + [0.0], "q99": [0.9] * 6 + [1.0], "mask": [True] * 6 + [False]}
            }
        },
        "flashvla": {"towers": towers},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return reference, folder


def example(seed, words=WORDS):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(1, 6, PIXELS, PIXELS, generator=generator)
    return pixels, [1, *torch.randint(3, 250, (words,), generator=generator).tolist()]


@pytest.mark.parametrize("restricted", [True, False], ids=["action ids", "any id"])
def test_generated_tokens_equal_the_independent_forward_pass(published, restricted):
    reference, folder = published
    model, _ = load_checkpoint(folder)
    decoder = ActionDecoder(model, restricted)
    allowed = (VOCAB - PADDING - 256, VOCAB - PADDING) if restricted else (0, VOCAB)
    answers = set()
    for seed in range(6):
        pixels, ids = example(seed, 3 + seed)
        expected = reference.greedy(pixels, ids, allowed)
        assert decoder.generate(pixels[:, None], [ids])[0].tolist() == expected
        answers.add(tuple(expected))
    assert len(answers) > 1


def test_a_batch_of_texts_of_differing_lengths_answers_as_one_by_one(published):
    reference, folder = published
    model, _ = load_checkpoint(folder)
    samples = [example(seed, words) for seed, words in ((1, 2), (2, 9), (3, 5))]
    tokens = ActionDecoder(model).generate(torch.stack([pixels for pixels, _ in samples]), [ids for _, ids in samples])
    allowed = (VOCAB - PADDING - 256, VOCAB - PADDING)
    assert tokens.tolist() == [reference.greedy(pixels, ids, allowed) for pixels, ids in samples]


def test_logits_equal_the_independent_forward_pass(published):
    reference, folder = published
    model, _ = load_checkpoint(folder)
    pixels, ids = example(11)
    with torch.no_grad():
        hidden, positions, _ = model.prompt(model.visual_tokens(pixels[:, None]), [ids])
        ours = model.language_model.logits(model.language_model.model(hidden, positions))
        theirs = reference.llama(inputs_embeds=reference.embedded(pixels, ids)).logits
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_a_kept_set_of_everything_generates_the_same_tokens(published):
    from mllm.decoder import Kept

    _, folder = published
    model, _ = load_checkpoint(folder)
    pixels, ids = example(3)
    hook = lambda state: Kept(torch.arange(state.hidden.shape[1])[None]) if state.layer == 2 else None  # noqa: E731
    assert torch.equal(
        ActionDecoder(model, hook=hook).generate(pixels[:, None], [ids]),
        ActionDecoder(model).generate(pixels[:, None], [ids]),
    )


@pytest.mark.parametrize("decoding", ["full", "slots"])
@torch.no_grad()
def test_one_pass_decodes_a_chunk_as_an_independent_forward_pass_does(published, decoding):
    reference, folder = published
    loaded, _ = load_checkpoint(folder)
    with torch.device("meta"):
        model = VLA(replace(loaded.config, decoding=decoding, chunk=2))
    model.load_state_dict(loaded.state_dict(), assign=True)
    count, low, answers = 14, torch.finfo(torch.float32).min, set()
    for seed in range(6):
        pixels, ids = example(seed)
        prompt = reference.embedded(pixels, ids)
        length = prompt.shape[1]
        if decoding == "full":
            stop = reference.llama.get_input_embeddings()(torch.tensor([[2]]))
            sequence = torch.cat([prompt, torch.zeros(1, count, 64), stop], 1)
            mask = torch.zeros(1, 1, length + count + 1, length + count + 1)
            rows = slice(length - 1, length - 1 + count)
        else:
            sequence = torch.cat([prompt, torch.zeros(1, count, 64)], 1)
            mask = torch.full((1, 1, length + count, length + count), low).triu(1)
            mask[:, :, length:] = 0
            rows = slice(length, length + count)
        allowed = slice(VOCAB - PADDING - 256, VOCAB - PADDING)
        logits = reference.llama(inputs_embeds=sequence, attention_mask=mask).logits[:, rows, allowed]
        tokens = ActionDecoder(model).generate(pixels[:, None], [ids])
        assert torch.equal(tokens, logits.argmax(-1) + allowed.start)
        answers.update(tokens[0].tolist())
    assert len(answers) > 1


def test_the_policy_turns_the_tokens_into_the_published_action(published):
    _, folder = published
    model, tokenizer = load_checkpoint(folder)
    policy = VLAPolicy(model, tokenizer, statistics="libero_spatial")
    policy.reset("pick up the bowl")
    step = policy.act(make_example(model.config))
    pixels = torch.from_numpy(policy.preprocess(make_example(model.config).images))[None]
    tokens = ActionDecoder(model).generate(pixels, [tokenizer.prompt("pick up the bowl")])[0].numpy()
    # The published predict_action, then LIBERO's evaluation: gripper to -1..1, binarised, and its sign turned.
    bins = np.linspace(-1, 1, 256)
    centres = (bins[:-1] + bins[1:]) / 2
    values = centres[np.clip(VOCAB - PADDING - tokens - 1, 0, 254)]
    expected = 0.5 * (values + 1) * 1.4 - 0.5
    expected[6] = -np.sign(2 * values[6] - 1)
    assert np.allclose(step.action, expected, atol=1e-6)
    assert list(step.timing) == ["preprocess", "vision", "prefill", "decode"]
