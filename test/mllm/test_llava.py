"""LLaVA against transformers' LlavaForConditionalGeneration, on a small random checkpoint that transformers wrote."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from mllm.compress import CompressConfig, Compressor  # noqa: E402
from mllm.decoder import KVCache  # noqa: E402
from mllm.describe import Generator, Processor, llava_prompt  # noqa: E402
from mllm.errors import PolicyError  # noqa: E402
from mllm.flops import counted  # noqa: E402
from mllm.llava import Llava, is_unused, llava_config, load_llava, published  # noqa: E402
from mllm.tensor_names import places  # noqa: E402
from mllm.torchvision_import import import_beside_torchvision  # noqa: E402

QUESTIONS = ["what is it ?", "what is on the table ?", "where is the red cube of soup and the blue bowl ?"]
SIZE, PATCHES, LAYERS, LIMIT = 28, 16, 4, 96


@pytest.fixture(scope="module")
def ours(their_llava):
    """(our model, our processor)."""
    model = load_llava(their_llava[2])
    return model, Processor(their_llava[2], model.config)


@pytest.fixture
def copy(their_llava, tmp_path):
    """A checkpoint of its own, for a test to change."""
    return shutil.copytree(their_llava[2], tmp_path / "checkpoint")


def picture(seed, width=40, height=31):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def asked(processor, images, question=QUESTIONS[0]):
    """The inputs of ours: pixels or None, and ids."""
    pixels = processor.pixels([picture(seed) for seed in range(images)]) if images else None
    return pixels, processor.ids(llava_prompt(question, images))


def their_answer(their_llava, images, question, most, **options):
    model, processor, _ = their_llava
    pictures = [picture(seed) for seed in range(images)] or None
    inputs = processor(images=pictures, text=llava_prompt(question, images), return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=most, do_sample=False, **options)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


def until_stop(tokens):
    return tokens[: tokens.index(2)] if 2 in tokens else tokens


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite(folder, name):
    """Has `name` rename every tensor, or leave it out where it says None."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name(old): tensor for old, tensor in tensors.items() if name(old)}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("images", [0, 1, 2])
@torch.no_grad()
def test_logits_equal_transformers(their_llava, ours, images):
    model, processor = ours
    pixels, ids = asked(processor, images)
    prompt = model.prompt(None if pixels is None else model.visual_tokens(pixels), [ids])
    answer = model.language_model.logits(model.language_model.model(prompt.hidden, prompt.positions))
    expected = their_llava[0](input_ids=torch.tensor([ids]), pixel_values=pixels).logits
    assert answer.shape == expected.shape
    assert (answer - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("images", [0, 1, 2])
def test_greedy_answers_equal_transformers(their_llava, ours, images, question):
    model, processor = ours
    pixels, ids = asked(processor, images, question)
    answer = Generator(model)(pixels, [ids], 24)
    expected = their_answer(their_llava, images, question, 24)
    assert answer.tokens[0] == until_stop(expected)


def test_an_answer_ends_before_the_token_that_stops_it(their_llava, ours, copy):
    pixels, ids = asked(ours[1], 1)
    free = Generator(ours[0])(pixels, [ids], 24).tokens[0]
    stop = next(token for token in free[3:] if token not in free[:3])
    change(copy / "generation_config.json", eos_token_id=[2, stop])
    answer = Generator(load_llava(copy))(pixels, [ids], 24)
    assert answer.tokens[0] == free[: free.index(stop)]
    assert answer.steps == free.index(stop)
    assert [*answer.tokens[0], stop] == their_answer(their_llava, 1, QUESTIONS[0], 24, eos_token_id=[2, stop])


def test_an_answer_from_nan_is_an_error_from_its_first_token_on(ours, copy):
    pixels, ids = asked(ours[1], 1)
    spoken = Generator(ours[0])(pixels, [ids], 2).tokens[0][0]
    model = load_llava(copy)
    with torch.no_grad():
        model.language_model.model.embed_tokens.weight[spoken] = torch.nan
    assert Generator(model)(pixels, [ids], 1).tokens == [[spoken]]
    with pytest.raises(PolicyError, match="answer comes from nan"):
        Generator(model)(pixels, [ids], 2)
    with torch.no_grad():
        model.language_model.model.norm.weight[0] = torch.nan
    with pytest.raises(PolicyError, match="answer comes from nan"):
        Generator(model)(pixels, [ids], 1)


def test_a_batch_with_differing_images_and_words_answers_as_one_by_one(ours):
    model, processor = ours
    alone = [asked(processor, images, question) for images, question in zip((1, 0, 2), QUESTIONS, strict=True)]
    pixels = torch.cat([one for one, _ in alone if one is not None])
    together = Generator(model)(pixels, [ids for _, ids in alone], 20).tokens
    assert together == [Generator(model)(one, [ids], 20).tokens[0] for one, ids in alone]


def test_pixels_and_ids_equal_those_of_transformers_processor(their_llava, ours):
    pictures = [picture(1), picture(2, 29, 77).convert("L")]
    text = llava_prompt(QUESTIONS[2], 2)
    expected = their_llava[1](images=pictures, text=text, return_tensors="pt")
    assert torch.equal(ours[1].pixels(pictures), expected["pixel_values"])
    assert ours[1].ids(text) == expected["input_ids"][0].tolist()
    assert ours[1].ids(text).count(4) == 2 * PATCHES


def newer(name):
    """transformers 4.52's names."""
    if name.startswith("language_model."):
        inner = name.removeprefix("language_model.")
        return inner if inner.startswith("lm_head") else f"model.language_model.{inner.removeprefix('model.')}"
    return f"model.{name}".replace("vision_tower.", "vision_tower.vision_model.")


def older(name):
    """Those of the published files."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


@pytest.mark.parametrize("name", [newer, older])
def test_the_layouts_of_other_versions_of_transformers_load(ours, copy, name):
    rewrite(copy, name)
    loaded, expected = load_llava(copy).state_dict(), ours[0].state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_sharded_files_and_tables_that_are_computed_load(their_llava, ours, copy):
    their_llava[0].save_pretrained(copy, max_shard_size="60KB")
    (copy / "model.safetensors").unlink()
    index = copy / "model.safetensors.index.json"
    table = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({table: torch.zeros(8)}, copy / "more.safetensors")
    weights = json.loads(index.read_text())["weight_map"]
    assert len(set(weights.values())) > 2
    change(index, weight_map={**weights, table: "more.safetensors"})
    loaded, expected = load_llava(copy).state_dict(), ours[0].state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_the_published_7b_has_the_tensors_that_its_short_configuration_asks_for(tmp_path):
    """Of sizes that are transformers' defaults the published config.json says nothing. Nothing is allocated here."""
    transformers = import_beside_torchvision("transformers")
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision.update(model_type="clip_vision_model", image_size=336, patch_size=14, projection_dim=768, vocab_size=32000)
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    config = {"model_type": "llava", "image_token_index": 32000, "pad_token_id": 32001, "projector_hidden_act": "gelu"}
    config.update(vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=False)
    (tmp_path / "config.json").write_text(json.dumps({**config, "vision_config": vision, "text_config": text}))
    with torch.device("meta"):
        ours = Llava(llava_config(tmp_path))
        theirs = transformers.LlavaForConditionalGeneration(transformers.AutoConfig.from_pretrained(tmp_path))
    assert ours.config.clip.patches == 576
    wanted = {
        name: place.of(ours.state_dict()).shape for name, place in places(list(ours.state_dict()), ours.config.decoder)
    }
    wanted = {published(name): shape for name, shape in wanted.items()}
    given = {published(name): tensor.shape for name, tensor in theirs.state_dict().items()}
    unused = {name for name in given if is_unused(name, ours.config)}
    assert wanted == {name: shape for name, shape in given.items() if name not in unused}
    assert {name.split(".")[4] for name in unused} == {"23"}


@torch.no_grad()
def test_the_tower_is_run_to_the_layer_that_is_looked_at_and_no_further(their_llava, ours):
    pixels = ours[1].pixels([picture(5)])
    expected = their_llava[0].model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(ours[0].vision_tower(pixels).last_hidden_state, expected)
    assert len(ours[0].vision_tower.encoder.layers) == 2


def test_weights_arrive_in_the_type_asked_for(their_llava, ours):
    model = load_llava(their_llava[2], dtype=torch.bfloat16)
    expected = ours[0].state_dict()
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in model.state_dict().items())
    assert Generator(model)(*many(asked(ours[1], 1)), 3).tokens[0]


def leave_out(name):
    return lambda old: None if name in old else old


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (leave_out("linear_1.bias"), r"lacks 'multi_modal_projector.linear_1.bias'"),
        (leave_out("vision_tower.encoder.layers.0.mlp.fc1.bias"), r"lacks 'vision_tower.*layers.0.mlp.fc1.bias'"),
        (lambda old: old.replace("linear_1", "linear_9"), r"has unknown 'multi_modal_projector.linear_9.bias'"),
        (lambda old: old.replace("layers.2.layer_norm1", "layers.3.layer_norm1"), r"has unknown .*layers.3"),
    ],
)
def test_a_missing_or_unknown_tensor_is_named(copy, name, message):
    rewrite(copy, name)
    with pytest.raises(PolicyError, match=message):
        load_llava(copy)


def test_a_tensor_under_two_names_is_refused(copy):
    path = copy / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"].clone()
    save_file(tensors, path)
    with pytest.raises(PolicyError, match=r"twice, as '.*lm_head.weight' and as '.*lm_head.weight'"):
        load_llava(copy)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llava_next"}, "model_type is 'llava_next': LLaVA-1.5 has 'llava'"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
        ({"vision_feature_layer": [-2, -1]}, "'vision_feature_layer' is '\\[-2, -1\\]'"),
        ({"vision_feature_layer": -5}, "vision_feature_layer is -5: it must be a whole number from -3 to 3"),
        ({"image_token_index": 40}, "image_token_index is 40: it must be a whole number from 0 to 39"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision_config: model_type is 'siglip"),
        ({"vision_config": {"model_type": "clip_vision_model", "hidden_size": 33}}, "hidden_size is 33"),
        ({"text_config": {"model_type": "mistral"}}, "text_config.model_type is 'mistral'"),
    ],
)
def test_a_configuration_that_is_no_llava_is_refused_by_its_field(copy, fields, message):
    change(copy / "config.json", **fields)
    with pytest.raises(PolicyError, match=message):
        load_llava(copy)


def test_a_tensor_of_another_shape_is_named(copy):
    config = json.loads((copy / "config.json").read_text())
    change(copy / "config.json", text_config={**config["text_config"], "vocab_size": 41})
    with pytest.raises(
        PolicyError, match=r"embed_tokens.weight' has shape \(40, 64\), where config.json asks for \(41, 64\)"
    ):
        load_llava(copy)


def test_a_truncated_file_is_refused(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PolicyError, match="truncated"):
        load_llava(copy)


def test_a_processor_that_does_not_fit_the_model_is_refused(ours, copy):
    change(copy / "config.json", image_token_index=5)
    with pytest.raises(PolicyError, match=r"<image> is id 4, and config\.json's 5"):
        Processor(copy, load_llava(copy).config)
    (copy / "tokenizer.json").unlink()
    (copy / "processor_config.json").write_text("{")
    with pytest.raises(PolicyError, match="no processor that transformers can read"):
        Processor(copy, ours[0].config)


@pytest.mark.parametrize("images", [0, 2])
def test_images_without_a_place_and_places_without_an_image_are_refused(ours, images):
    model, processor = ours
    pixels = asked(processor, images)[0]
    with pytest.raises(PolicyError, match=rf"room for 16 visual tokens, and the images make {16 * images}: .*<image>"):
        Generator(model)(pixels, [processor.ids(llava_prompt("what is it ?"))], 4)


def test_a_prompt_and_an_answer_beyond_the_models_positions_are_refused(ours):
    model, processor = ours
    pixels, ids = asked(processor, 1)
    room = LIMIT - len(ids)
    assert len(Generator(model)(pixels, [ids], room).tokens[0]) <= room
    with pytest.raises(PolicyError, match=f"has {len(ids)} tokens and the answer may have {room + 1}: .* 96 positions"):
        Generator(model)(pixels, [ids], room + 1)


def many(one):
    """One sample's inputs as a batch of one."""
    return one[0], [one[1]]


METHODS = ("flashvla", "tokencarve", "fastv", "random", "uniform")


@pytest.mark.parametrize("method", METHODS)
def test_keeping_all_changes_no_bit(ours, method):
    model, processor = ours
    pixels, ids = asked(processor, 2)
    prompt = model.prompt(model.visual_tokens(pixels), [ids])
    config = CompressConfig(method, keep=2 * PATCHES)
    hook = Compressor(config, prompt.visual.nonzero()[None, :, 1], LAYERS, images=2)
    states = [model.language_model.model(prompt.hidden, prompt.positions, hook=hook) for hook in (None, hook)]
    assert torch.equal(*states)
    plain, kept = (Generator(model, given)(pixels, [ids], 24) for given in (None, config))
    assert plain.tokens == kept.tokens
    assert plain.cache_bytes == kept.cache_bytes == kept.full_cache_bytes
    assert plain.prefill_flops == kept.prefill_flops == kept.full_prefill_flops
    assert kept.dropped == 0


@pytest.mark.parametrize("trim", [True, False], ids=["trimmed", "ragged"])
@pytest.mark.parametrize("method", METHODS)
@torch.inference_mode()
def test_a_compressed_answer_goes_on_at_the_prompts_length_over_what_was_kept(ours, method, trim):
    model, processor = ours
    decoder, config = model.language_model, CompressConfig(method, keep=10, trim=trim)
    pixels, ids = asked(processor, 2)
    count, dropped = len(ids), 2 * PATCHES - 10
    prompt = model.prompt(model.visual_tokens(pixels), [ids])
    hook = Compressor(config, prompt.visual.nonzero()[None, :, 1], LAYERS, images=2)
    cache = KVCache(model.config.decoder, 1, count + 20)
    hidden = decoder.model(prompt.hidden, prompt.positions, cache=cache, hook=hook, last=1)
    assert cache.used == [count - dropped * trim] * 2 + [count - dropped] * 2
    expected = []
    for step in range(20):
        expected.append(int(decoder.logits(hidden).argmax()))
        token = decoder.model.embed_tokens(torch.tensor([expected[-1:]]))
        hidden = decoder.model(token, torch.tensor([[count + step]]), cache=cache)
    answer = Generator(model, config)(pixels, [ids], 20)
    assert answer.tokens[0] == until_stop(expected)
    assert answer.dropped == dropped
    # Keys and values of 4 layers, 2 heads of 16 numbers.
    assert answer.full_cache_bytes == count * 2 * LAYERS * 2 * 16 * 4
    assert answer.cache_bytes == (count - dropped * trim) * 2 * LAYERS * 2 * 16 * 4


def test_a_compressed_batch_of_differing_words_answers_as_one_by_one(ours):
    model, processor = ours
    generate = Generator(model, CompressConfig("tokencarve", keep=6))
    alone = [asked(processor, 1, question) for question in QUESTIONS]
    pixels = torch.cat([one for one, _ in alone])
    together = generate(pixels, [ids for _, ids in alone], 20).tokens
    assert together == [generate(one, [ids], 20).tokens[0] for one, ids in alone]


def test_what_cannot_be_compressed_is_refused(ours):
    model, processor = ours
    generate = Generator(model, CompressConfig("tokencarve", keep=17))
    one, two = asked(processor, 1), asked(processor, 2)
    with pytest.raises(PolicyError, match="keep is 17: there are 16 visual tokens"):
        generate(*many(one), 4)
    with pytest.raises(PolicyError, match=r"the samples have \[16, 32\] visual tokens"):
        generate(torch.cat((one[0], two[0])), [one[1], two[1]], 4)


@pytest.mark.parametrize("method", ["none", "uniform"])
def test_prefill_flops_equal_torchs_counter(ours, method):
    model, processor = ours
    pixels, ids = asked(processor, 2)
    prompt = model.prompt(model.visual_tokens(pixels), [ids])
    generate = Generator(model, CompressConfig(method, keep=8))
    answer = generate(pixels, [ids], 1)
    assert answer.prefill_flops == counted(lambda: generate._prefill(prompt, generate._hook(prompt)))
    assert (answer.prefill_flops < answer.full_prefill_flops) == (method == "uniform")
