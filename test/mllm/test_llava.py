"""LLaVA against transformers' LlavaForConditionalGeneration, on a small random checkpoint that transformers wrote."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mllm.torchvision_import import import_beside_torchvision  # noqa: E402

transformers = import_beside_torchvision("transformers")

from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402

from mllm.describe import Generator, Processor, llava_prompt  # noqa: E402
from mllm.llava import load_llava  # noqa: E402

QUESTIONS = ["what is it ?", "what is on the table ?", "where is the red cube of soup and the blue bowl ?"]
WORDS = ["USER", ":", "ASSISTANT", *dict.fromkeys(" ".join(QUESTIONS).split())]
SIZE, PATCHES, LAYERS, LIMIT = 28, 16, 4, 96


def make_processor():
    names = ["<unk>", "<s>", "</s>", "<pad>", "<image>", *WORDS]
    fast = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
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
    images = transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return transformers.LlavaProcessor(
        images, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(transformers' model, its processor, folder of both)."""
    torch.manual_seed(3)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=7,
        ),
        text_config=transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=40,
            max_position_embeddings=LIMIT,
            pad_token_id=3,
        ),
        image_token_index=4,
        image_seq_length=PATCHES,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        scale = "norm" in name and name.endswith("weight")
        parameter.data.normal_(std=0.2).add_(1.0 if scale else 0.0)
    processor, folder = make_processor(), tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, folder


@pytest.fixture(scope="module")
def ours(theirs):
    """(our model, our processor)."""
    model = load_llava(theirs[2])
    return model, Processor(theirs[2], model.config)


@pytest.fixture
def copy(theirs, tmp_path):
    """A checkpoint of its own, for a test to change."""
    return shutil.copytree(theirs[2], tmp_path / "checkpoint")


def picture(seed, width=40, height=31):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def asked(processor, images, question=QUESTIONS[0]):
    """The inputs of ours: pixels or None, and ids."""
    pixels = processor.pixels([picture(seed) for seed in range(images)]) if images else None
    return pixels, processor.ids(llava_prompt(question, images))


def their_answer(theirs, images, question, most, **options):
    model, processor, _ = theirs
    pictures = [picture(seed) for seed in range(images)] or None
    inputs = processor(images=pictures, text=llava_prompt(question, images), return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=most, do_sample=False, **options)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite(folder, name):
    """Has `name` rename every tensor, or leave it out where it says None."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name(old): tensor for old, tensor in tensors.items() if name(old)}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("images", [0, 1, 2])
@torch.no_grad()
def test_logits_equal_transformers(theirs, ours, images):
    model, processor = ours
    pixels, ids = asked(processor, images)
    prompt = model.prompt(None if pixels is None else model.visual_tokens(pixels), [ids])
    answer = model.language_model.logits(model.language_model.model(prompt.hidden, prompt.positions))
    expected = theirs[0](input_ids=torch.tensor([ids]), pixel_values=pixels).logits
    assert answer.shape == expected.shape
    assert (answer - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("images", [0, 1, 2])
def test_greedy_answers_equal_transformers(theirs, ours, images, question):
    model, processor = ours
    pixels, ids = asked(processor, images, question)
    answer = Generator(model)(pixels, [ids], 24)
    expected = their_answer(theirs, images, question, 24)
    assert answer.tokens[0] == expected[: expected.index(2)] if 2 in expected else answer.tokens[0] == expected


def test_an_answer_ends_before_the_token_that_stops_it(theirs, ours, copy):
    free = Generator(ours[0])(*_batch(asked(ours[1], 1)), 24).tokens[0]
    stop = next(token for token in free[3:] if token not in free[:3])
    change(copy / "generation_config.json", eos_token_id=[2, stop])
    model = load_llava(copy)
    answer = Generator(model)(*_batch(asked(ours[1], 1)), 24)
    assert answer.tokens[0] == free[: free.index(stop)]
    assert answer.steps == free.index(stop)
    assert [*answer.tokens[0], stop] == their_answer(theirs, 1, QUESTIONS[0], 24, eos_token_id=[2, stop])


def _batch(one):
    return one[0], [one[1]]
