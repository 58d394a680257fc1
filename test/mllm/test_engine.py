"""Decoding with static shapes against the decoder's own way, and what is compiled or recorded against what is not."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from mllm.config import DECODING, DINOV2, SIGLIP, DecoderConfig, TowerConfig, VLAConfig  # noqa: E402
from mllm.decoder import Kept, KVCache  # noqa: E402
from mllm.engine import JacobiLoop, Recorded, one_thread  # noqa: E402
from mllm.errors import PolicyError  # noqa: E402
from mllm.generate import ActionDecoder  # noqa: E402
from mllm.tokenizer import WordTokenizer  # noqa: E402
from mllm.vla import VLA, init_random  # noqa: E402
from mllm.vla_policy import VLAPolicy, make_example  # noqa: E402

TINY = VLAConfig(
    (TowerConfig("conv-vit", 32, 32, 1, 2, 48),),
    DecoderConfig(64, 96, 3, 4, 2, 400, max_position_embeddings=96),
    cameras=("agentview", "wrist"),
    vocab_padding=0,
)
OPENVLA = VLAConfig(
    (TowerConfig(DINOV2, 56, width=32, depth=3, heads=2), TowerConfig(SIGLIP, 56, width=48, depth=4, heads=3)),
    DecoderConfig(64, 96, 2, 4, 4, 600, max_position_embeddings=96),
)
TEXTS = {"alone": [[1, 5, 6, 7, 2]], "padded": [[1, 5, 6, 7, 2], [1, 2], [1, 9, 8, 2]]}
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU, and torch finds none")


@pytest.fixture(scope="module")
def model():
    return init_random(VLA(TINY), 3).eval()


def prompt(model, texts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(len(texts), 2, 3, 32, 32, generator=generator)
    return model.prompt(model.visual_tokens(pixels), texts)


def choose(trim):
    """Every sample keeps six positions of its own, from the second layer on."""

    def hook(state):
        if state.layer != 1:
            return None
        rows = torch.arange(len(state.hidden))[:, None]
        last = state.hidden.shape[1]
        return Kept(
            torch.cat((rows, rows + 3, rows + 4, torch.arange(last - 3, last).expand(len(rows), -1)), 1), trim=trim
        )

    return hook


@pytest.mark.parametrize("hook", [None, choose(True), choose(False)], ids=["all kept", "trimmed", "ragged"])
@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
@torch.inference_mode()
def test_a_pass_foretells_what_the_decoder_does_token_by_token(model, texts, hook):
    language, (hidden, positions, valid) = model.language_model, prompt(model, texts)
    batch, length, _ = hidden.shape
    caches = [KVCache(TINY.decoder, batch, length + spare) for spare in (3, 17)]
    for cache in caches:
        language.model(hidden, positions, valid=valid, cache=cache, hook=hook, last=1)
    loop = JacobiLoop(model.language_model, caches[1], TINY.action_ids, 4)
    loop.load(positions[:, -1:] + 1)
    tokens = torch.randint(*TINY.action_ids, (batch, 3))
    for _ in range(2):  # a pass over what the pass before has left
        loop.foretell(tokens.flip(1))
        following, logits = loop.foretell(tokens)
    hidden = torch.randn(batch, 3, 64)
    places, slots = positions[:, -1:] + 1 + torch.arange(3), loop.slot[:, None] + torch.arange(3)
    together = language.model.step(
        hidden, language.model.rotary(places, torch.float32), caches[1].pairs, slots, loop.bias
    )
    state = caches[0].state
    for done in range(3):
        alone = language.model(hidden[:, done : done + 1], places[:, done : done + 1], cache=caches[0])
        assert torch.allclose(together[:, done : done + 1], alone, atol=1e-5)
    caches[0].state = state
    for done in range(3):
        place = positions[:, -1:] + 1 + done
        expected = language.best(
            language.model(model.embed(tokens[:, done : done + 1]), place, cache=caches[0]), loop.ids
        )
        assert torch.equal(following[:, done : done + 1], expected[0])
        assert torch.allclose(logits[:, done : done + 1], expected[1], atol=1e-5)


@torch.inference_mode()
def greedy(model, hidden, positions, valid, hook=None):
    """An answer by the decoder's own way."""
    language = model.language_model
    cache = KVCache(model.config.decoder, len(hidden), hidden.shape[1] + model.config.action_tokens)
    last = language.model(hidden, positions, valid=valid, cache=cache, hook=hook, last=1)
    tokens = [language.best(last, model.config.action_ids)[0]]
    for done in range(1, model.config.action_tokens):
        tokens.append(
            language.best(
                language.model(model.embed(tokens[-1]), positions[:, -1:] + done, cache=cache), model.config.action_ids
            )[0]
        )
    return torch.cat(tokens, 1)


@torch.inference_mode()
def test_one_decoder_serves_prompts_of_every_length_and_number_in_any_order(model):
    decoder = ActionDecoder(model)
    long = [[1, *range(3, 50), 2]]
    for seed, texts in enumerate([TEXTS["alone"], TEXTS["padded"], long, TEXTS["alone"], TEXTS["padded"]]):
        asked = prompt(model, texts, seed)
        assert torch.equal(decoder.decode(decoder.prefill(*asked)), greedy(model, *asked))


@torch.inference_mode()
def test_whatever_the_guess_an_answer_is_the_greedy_one_in_no_more_passes_than_tokens_follow(model):
    decoder = ActionDecoder(model)
    for seed in range(10):
        asked = prompt(model, TEXTS["padded"], seed)
        answer = greedy(model, *asked)
        first = decoder.prefill(*asked)
        for guess, most in (
            (None, 6),
            (answer.roll(1, 0), 6),
            (answer, 1),
            (torch.cat((answer[:, :5], first, first), 1), 2),
        ):
            assert torch.equal(decoder.decode(first, guess), answer)
            assert 1 <= decoder.passes <= most


@torch.inference_mode()
def test_decoding_an_answer_again_gives_it_again(model):
    decoder = ActionDecoder(model, hook=choose(False))
    asked = prompt(model, TEXTS["padded"])
    answers = [decoder.decode(decoder.prefill(*asked)) for _ in range(2)]
    assert torch.equal(*answers)
    assert torch.equal(answers[0], greedy(model, *asked, choose(False)))


def test_one_thread_gives_the_others_back_even_after_an_error():
    before = torch.get_num_threads()
    with one_thread(True):
        assert torch.get_num_threads() == 1
    with pytest.raises(PolicyError), one_thread(True):
        raise PolicyError("an error")
    assert torch.get_num_threads() == before
    with one_thread(False):
        assert torch.get_num_threads() == before


@pytest.mark.parametrize("decoding", DECODING)
def test_the_longest_text_that_there_is_room_for_is_answered_and_one_word_more_is_an_error(decoding):
    model = init_random(VLA(replace(TINY, decoding=decoding)), 3).eval()
    room = 96 - 8 - 7 - (decoding == "full")  # visual tokens, the answer's, and the stop behind it
    decoder, pixels = ActionDecoder(model), torch.zeros(1, 2, 3, 32, 32)
    assert decoder.generate(pixels, [[1] * room]).shape == (1, 7)
    with pytest.raises(
        PolicyError, match=f"has {room + 1} words and 8 visual tokens: the model has room for {room + 8}"
    ):
        decoder.generate(pixels, [[1] * (room + 1)])


BROKEN = {
    "a norm": lambda model: model.language_model.model.norm.weight.fill_(torch.nan),
    "a row of the head": lambda model: model.language_model.lm_head.weight[399].fill_(torch.inf),
    "overflow": lambda model: model.half().language_model.model.layers[1].mlp.gate_up_proj.weight.mul_(2**11),
    "action tokens": lambda model: model.language_model.model.embed_tokens.weight[144:].fill_(torch.nan),
}


@pytest.mark.parametrize(
    ("part", "decoding"),
    [*((part, decoding) for part in list(BROKEN)[:3] for decoding in DECODING), ("action tokens", "causal")],
)
@torch.no_grad()
def test_an_answer_from_numbers_that_are_not_finite_is_an_error(part, decoding):
    model = init_random(VLA(replace(TINY, decoding=decoding)), 3)
    policy = VLAPolicy(model, WordTokenizer())
    policy.reset("go")
    policy.act(make_example(TINY))
    BROKEN[part](model)
    policy = VLAPolicy(model, WordTokenizer())
    policy.reset("go")
    with pytest.raises(PolicyError, match=r"answer comes from (nan|inf): .* check the checkpoint, or use float32"):
        policy.act(make_example(TINY))


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler, and there is none"
)
@torch.inference_mode()
def test_a_compiled_model_gives_the_same_numbers():
    config = replace(TINY, decoder=replace(TINY.decoder, num_hidden_layers=2))
    plain, compiled = (init_random(VLA(config), 3).eval() for _ in range(2))
    ours, expected = VLAPolicy(compiled, WordTokenizer(), compile=True).decoder, ActionDecoder(plain)
    pixels = torch.randn(1, 2, 3, 32, 32)
    visual = ours.visual_tokens(pixels)
    assert torch.allclose(visual, plain.visual_tokens(pixels), atol=1e-5)
    asked = plain.prompt(visual, TEXTS["alone"])
    assert torch.equal(ours.decode(ours.prefill(*asked)), expected.decode(expected.prefill(*asked)))
    for layer, (mine, theirs) in enumerate(zip(ours._loop.cache.pairs, expected._loop.cache.pairs, strict=True)):
        for own, other in zip(mine, theirs, strict=True):
            assert torch.allclose(own, other, atol=1e-5), layer


def test_compiling_without_a_compiler_is_an_error_that_says_so(model, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(PolicyError, match="compile needs the C\\+\\+ compiler 'no-such-compiler'"):
        VLAPolicy(model, WordTokenizer(), compile=True)


@CUDA
@torch.inference_mode()
def test_a_recorded_answer_equals_the_eager_one_for_every_shape():
    model = init_random(VLA(TINY), 3).eval().cuda()
    recorded, hook = ActionDecoder(model), ActionDecoder(model, hook=lambda state: None)
    for seed, texts in enumerate([TEXTS["alone"], TEXTS["padded"], TEXTS["alone"], [[1, *range(3, 50), 2]]] * 2):
        pixels = torch.randn(len(texts), 2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).cuda()
        visual = recorded.visual_tokens(pixels).clone()
        assert torch.allclose(visual, model.visual_tokens(pixels), atol=1e-4)
        asked = model.prompt(visual, texts)
        answer = recorded.decode(recorded.prefill(*asked)).clone()
        assert torch.equal(answer, greedy(model, *asked))
        assert torch.equal(answer, hook.decode(hook.prefill(*asked)))


@CUDA
def test_a_graph_answers_new_inputs_of_a_known_shape_without_calling_the_function():
    calls = []

    def double(x, y):
        calls.append(x.shape)
        return 2 * x if y is None else 2 * x + y

    recorded = Recorded(double, record=True)
    for value in (1.0, 2.0, 3.0):
        x = torch.full((4,), value, device="cuda")
        assert recorded(x, None).tolist() == [2 * value] * 4
        assert recorded(x, x).tolist() == [3 * value] * 4
    assert len(calls) == 6  # twice to warm up and once to record, for each of the two


@pytest.mark.parametrize("decoding", ["causal", "slots", "full"])
@torch.inference_mode()
def test_what_is_recorded_never_looks_at_a_value(decoding):
    """A tensor on the meta device has none: whatever copied one to the host, or made a shape of one, would fail."""
    with torch.device("meta"):
        model = VLA(replace(OPENVLA, decoding=decoding)).eval()
        pixels = torch.empty(2, 1, 6, 56, 56)
        decoder = ActionDecoder(model)
        visual = decoder.visual_tokens(pixels)
        hidden = torch.cat((model.embed(torch.zeros(2, 5, dtype=torch.int64)), visual), 1)
        positions = torch.arange(hidden.shape[1])[None]
        for valid in (None, torch.ones(hidden.shape[:2], dtype=torch.bool)):
            first = decoder.prefill(hidden, positions, valid)
            if decoding == "causal":
                tokens, logits = decoder._loop.foretell(first.expand(-1, 6))
                assert tokens.shape == logits.shape == (2, 6)
                first = torch.cat((first, tokens), 1)
            assert first.device.type == "meta"
            assert first.shape == (2, 7)
