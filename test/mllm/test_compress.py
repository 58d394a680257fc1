"""Selection and merging on made-up tokens, against the methods written out slowly, and the hook in a small decoder."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from mllm.compress import METHODS, CompressConfig, Compressor, attention_of, select  # noqa: E402
from mllm.config import DecoderConfig  # noqa: E402
from mllm.contribution import gram, information_contribution  # noqa: E402
from mllm.decoder import KVCache, LanguageModel, LayerState  # noqa: E402
from mllm.errors import PolicyError  # noqa: E402
from mllm.selection import carve, draw, points, top  # noqa: E402

COUNT, SIZE = 24, 16


@pytest.fixture(autouse=True)
def _one_thread(_two_threads_and_a_seed):
    torch.set_num_threads(1)


def drawn(batch=3, count=COUNT, size=SIZE, seed=0):
    """Tokens and what a query pays to each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, count, size, generator=generator) + torch.randn(1, 1, size, generator=generator)
    return tokens, torch.rand(batch, count, generator=generator)


def carved_by_the_book(tokens, attention, keep, weight=0.5):
    """TokenCarve for one sample, as its authors describe it, one token at a time: {place: row} and {gone: into}."""
    count = len(tokens)
    left, sizes, _ = torch.linalg.svd(tokens.double(), full_matrices=True)
    contribution = [sum(abs(left[x, i]) * sizes[i] for i in range(len(sizes))).item() for x in range(count)]
    total = [0.0] * count
    for scores, part in ((attention.tolist(), weight), (contribution, 1 - weight)):
        falling = sorted(range(count), key=lambda x: (-scores[x], x))
        for rank, x in enumerate(falling):
            total[x] += part * (count - rank)
    survivors = sorted(range(count), key=lambda x: (-total[x], x))[: keep + keep // 2]
    half = len(survivors) - len(survivors) // 2
    upper, lower = survivors[:half], survivors[half:]

    def cosine(x, y):
        a, b = tokens[x].double(), tokens[y].double()
        return (a @ b / (a.norm() * b.norm())).item()

    best = {b: max(sorted(upper), key=lambda a: (cosine(a, b), -a)) for b in lower}
    gone = sorted(lower, key=lambda b: (-cosine(best[b], b), b))[: keep // 2]
    rows = {x: tokens[x] for x in survivors if x not in gone}
    for a in upper:
        joined = [tokens[a], *(tokens[b] for b in gone if best[b] == a)]
        rows[a] = torch.stack(joined).mean(0)
    return dict(sorted(rows.items())), {b: best[b] for b in sorted(gone)}


@pytest.mark.parametrize("weight", [0.5, 0.25, 0.0, 1.0])
@pytest.mark.parametrize("keep", [2, 8, 10, 16])
def test_tokencarve_is_the_method_written_out(keep, weight):
    config = CompressConfig("tokencarve", keep=keep, attention_weight=weight)
    for seed in range(4):
        tokens, attention = drawn(seed=seed)
        selection = select(config, tokens, attention)
        for sample in range(len(tokens)):
            rows, merged = carved_by_the_book(tokens[sample], attention[sample], keep, weight)
            assert len(rows) == keep
            assert selection.kept[sample].tolist() == list(rows)
            assert dict(selection.merged[sample].tolist()) == merged
            assert torch.allclose(selection.tokens[sample], torch.stack(list(rows.values())), atol=1e-6)


@pytest.mark.parametrize("keep", [1, 3, 5, 17, 20, 23, COUNT])
def test_tokencarve_keeps_as_many_as_asked_where_the_book_says_nothing(keep):
    """Odd numbers, and more than two thirds of all, where there are not 1.5 times as many."""
    tokens, attention = drawn()
    selection = select(CompressConfig("tokencarve", keep=keep), tokens, attention)
    assert selection.kept.shape == (3, keep)
    assert (selection.kept.diff() > 0).all()
    gone = min(keep + keep // 2, COUNT) - keep
    assert selection.merged.shape == (3, gone, 2)
    if gone:
        into, kept = selection.merged[..., 1], selection.kept
        assert all(set(a.tolist()) <= set(k.tolist()) for a, k in zip(into, kept, strict=True))
        assert not any(set(g.tolist()) & set(k.tolist()) for g, k in zip(selection.merged[..., 0], kept, strict=True))
    else:
        assert selection.tokens is None


def test_equal_tokens_are_merged_into_the_first_of_those_they_are_like():
    tokens = torch.ones(1, 6, 4)
    total = torch.tensor([[6.0, 5, 4, 3, 2, 1]])
    selection = carve(tokens, gram(tokens), total, 4)
    assert selection.kept.tolist() == [[0, 1, 2, 5]]
    assert selection.merged.tolist() == [[[3, 0], [4, 0]]]
    assert torch.equal(selection.tokens, torch.ones(1, 4, 4))


def test_of_equal_scores_the_lower_index_comes_first():
    scores = torch.tensor([[1.0, 2, 2, 2, 1, 1]])
    assert top(scores, 2).tolist() == [[1, 2]]
    assert top(scores, 4).tolist() == [[0, 1, 2, 3]]
    assert points(scores).tolist() == [[3, 6, 5, 4, 2, 1]]


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_batch_gets_what_each_sample_gets_alone(method):
    tokens, attention = drawn(batch=5)
    config = CompressConfig(method, keep=10)
    together = select(config, tokens, attention)
    for sample in range(5):
        one = slice(sample, sample + 1)
        alone = select(config, tokens[one], attention[one])
        assert torch.equal(alone.kept, together.kept[one])
        if alone.merged is not None:
            assert torch.equal(alone.merged, together.merged[one])
            assert torch.allclose(alone.tokens, together.tokens[one], atol=1e-6)


def test_every_method_keeps_what_its_score_says():
    tokens, attention = drawn(batch=1)
    kept = {method: select(CompressConfig(method, keep=6, seed=5), tokens, attention).kept[0] for method in METHODS[1:]}
    scores = information_contribution(tokens)[0]
    assert kept["flashvla"].tolist() == sorted(scores.topk(6).indices.tolist())
    assert kept["fastv"].tolist() == sorted(attention[0].topk(6).indices.tolist())
    assert kept["uniform"].tolist() == [2, 6, 10, 14, 18, 22]
    assert kept["random"].tolist() == draw(COUNT, 6, 5, torch.device("cpu")).tolist()
    assert kept["random"].tolist() != draw(COUNT, 6, 6, torch.device("cpu")).tolist()
    other, _ = drawn(batch=1, seed=9)
    assert torch.equal(select(CompressConfig("random", keep=6, seed=5), other).kept[0], kept["random"])


def test_a_method_that_lacks_its_attention_is_refused():
    tokens, _ = drawn()
    for method in ("tokencarve", "fastv", "none"):
        with pytest.raises(ValueError, match=f"by method '{method}' with none of attention"):
            select(CompressConfig(method, keep=6), tokens)


def test_the_scored_matrix_may_be_another_than_the_tokens_that_are_merged():
    tokens, attention = drawn()
    scored = torch.randn(3, COUNT, SIZE)
    config = CompressConfig("tokencarve", keep=8)
    selection = select(config, tokens, attention, scored)
    total = 0.5 * points(attention) + 0.5 * points(information_contribution(scored))
    expected = carve(tokens, gram(tokens), total, 8)
    assert torch.equal(selection.kept, expected.kept)
    assert torch.equal(selection.tokens, expected.tokens)


def state(batch=2, prompt=40, heads=4, groups=2, valid=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, attended = normal(batch, prompt, SIZE), normal(batch, prompt, SIZE)
    query, key = normal(batch, heads, prompt, 4), normal(batch, groups, prompt, 4)
    return LayerState(2, hidden, torch.arange(prompt)[None], valid, attended, query, key)


def test_a_row_of_attention_is_the_softmaxs():
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, 26:29] = False
    seen = state(valid=valid)
    key = seen.key.repeat_interleave(2, 1)
    scores = seen.query @ key.transpose(2, 3) / 2
    scores = scores.masked_fill(torch.ones(40, 40).triu(1).bool() | ~valid[:, None, None], -torch.inf)
    whole = scores[:, :, 29:].softmax(-1).mean(1)
    assert torch.allclose(attention_of(seen, slice(38, 39), 39), whole[:, 9, :39], atol=1e-6)
    assert (attention_of(seen, slice(39, 40), 40)[1, 26:29] == 0).all()


@pytest.mark.parametrize(
    ("options", "rows", "sees"),
    [
        ({}, slice(39, 40), 40),
        ({"slots": 6}, slice(33, 34), 34),
        ({"slots": 6, "answer": True}, slice(34, 40), 40),
        ({"slots": 6, "stop": 1, "mutual": True}, slice(32, 33), 40),
        ({"slots": 6, "stop": 1, "mutual": True, "answer": True}, slice(32, 38), 40),
    ],
    ids=["causal", "slots", "slots' own", "full", "full's own"],
)
def test_the_query_is_the_last_token_of_the_prompt_or_the_answers_slots(options, rows, sees):
    options = dict(options)
    query = "answer" if options.pop("answer", False) else "prompt"
    places = torch.arange(1, 25)[None]
    hook = Compressor(CompressConfig("fastv", keep=6, query=query), places, 4, **options)
    seen = state()
    expected = top(attention_of(seen, rows, sees)[:, 1:25], 6) + 1
    kept = hook(seen).index
    assert [[p for p in row if 1 <= p < 25] for row in kept.tolist()] == expected.tolist()


@pytest.mark.parametrize("method", METHODS[1:])
def test_nothing_but_visual_tokens_is_dropped_wherever_they_stand(method):
    """Two samples whose images begin at places of their own, as in a conversation."""
    places = torch.stack((torch.arange(3, 27), torch.cat((torch.arange(1, 13), torch.arange(20, 32)))))
    seen = state()
    hook = Compressor(CompressConfig(method, keep=8), places, 4)
    kept = hook(seen)
    assert kept.index.shape == (2, 40 - 24 + 8)
    assert (kept.index.diff() > 0).all()
    tokens = seen.hidden.gather(1, places[..., None].expand(-1, -1, SIZE))
    attention = attention_of(seen, slice(39, 40), 40).gather(1, places)
    selection = select(hook.config, tokens, attention)
    for sample in range(2):
        others = sorted(set(range(40)) - set(places[sample].tolist()))
        chosen = places[sample][selection.kept[sample]].tolist()
        assert kept.index[sample].tolist() == sorted(others + chosen)
        if kept.hidden is not None:
            where = dict(zip(kept.index[sample].tolist(), kept.hidden[sample], strict=True))
            assert all(torch.equal(where[place], seen.hidden[sample, place]) for place in others)
            assert torch.equal(torch.stack([where[place] for place in chosen]), selection.tokens[sample])
            assert kept.merged[sample, :, 0].tolist() == places[sample][selection.merged[sample, :, 0]].tolist()
            assert kept.merged[sample, :, 1].tolist() == places[sample][selection.merged[sample, :, 1]].tolist()


@pytest.mark.parametrize("method", METHODS[1:])
def test_per_camera_each_has_its_own_part_by_its_own_scores(method):
    seen, places = state(), torch.arange(1, 25)[None]
    config = CompressConfig(method, keep=12, per_camera=True)
    kept = Compressor(config, places, 4, images=3)(seen)
    attention = attention_of(seen, slice(39, 40), 40)
    parts, pairs = [], []
    for camera in range(3):
        part = slice(1 + 8 * camera, 9 + 8 * camera)
        one = select(replace(config, keep=4), seen.hidden[:, part], attention[:, part])
        parts.append(one.kept + part.start)
        pairs.append(one.merged)
    chosen = torch.cat(parts, 1)
    assert torch.equal(kept.index[:, 1:13], chosen)
    if method == "tokencarve":
        expected = torch.cat([pair + 1 + 8 * camera for camera, pair in enumerate(pairs)], 1)
        assert torch.equal(kept.merged, expected)


@pytest.mark.parametrize(("trim", "used"), [(True, [28, 28, 28, 28]), (False, [40, 40, 28, 28])])
@torch.no_grad()
def test_kept_tokens_stay_at_their_positions_and_the_earlier_cache_is_trimmed_or_not(trim, used):
    model = LanguageModel(DecoderConfig(SIZE, 24, 4, 2, 1, 50, max_position_embeddings=64)).eval()
    compressor = Compressor(CompressConfig("flashvla", keep=12, trim=trim), torch.arange(1, 25)[None], 4)
    states, choices = [], []

    def hook(layer_state):
        states.append(layer_state)
        choices.append(compressor(layer_state))
        return choices[-1]

    cache = KVCache(model.model.config, 2, 41)
    model.model(torch.randn(2, 40, SIZE), torch.arange(40)[None], cache=cache, hook=hook)
    assert [choice is None for choice in choices] == [True, False, True]
    assert torch.equal(states[2].positions, choices[1].index)
    assert cache.used == used


def test_keeping_all_keeps_every_row_as_it_was():
    seen, places = state(), torch.arange(1, 25)[None]
    for method in METHODS[1:]:
        kept = Compressor(CompressConfig(method, keep=24), places, 4)(seen)
        assert torch.equal(kept.index, torch.arange(40).expand(2, -1))
        assert kept.hidden is None
    assert Compressor(CompressConfig("none"), places, 4)(seen) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "method is 'best': choose one of none, flashvla"),
        ({"keep": 0}, "keep is 0: it must be a whole number from 1"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"layer": 0}, "layer is 0"),
        ({"matrix": "keys"}, "matrix is 'keys'"),
        ({"energy": 0}, "energy is 0: it must be a number from 1e-06 to 1"),
        ({"attention_weight": 1.1}, "attention_weight is 1.1"),
        ({"centre": 1}, "centre is 1: it must be true or false"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it(options, message):
    with pytest.raises(PolicyError, match=message):
        CompressConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 25}, "keep is 25: there are 24 visual tokens; keep 1 to that"),
        ({"layer": 4}, "layer is 4: the decoder has 4 layers; choose 1 to 3"),
        ({"keep": 7, "per_camera": True}, "2 cameras with 24 tokens cannot have equal parts"),
    ],
)
def test_what_a_model_cannot_keep_is_refused_with_its_numbers(options, message):
    with pytest.raises(PolicyError, match=message):
        Compressor(CompressConfig("flashvla", **{"keep": 8, **options}), torch.arange(24)[None], 4, images=2)


def test_a_policys_options_name_a_method_or_all_fields():
    assert CompressConfig.parse("flashvla", 64) == CompressConfig("flashvla", keep=64)
    assert CompressConfig.parse({"method": "fastv", "keep": 9, "trim": False}) == CompressConfig("fastv", 9, trim=False)
    with pytest.raises(PolicyError, match="compress has no setting 'budget'; choose from method, keep"):
        CompressConfig.parse({"method": "fastv", "budget": 9})


def test_method_none_may_have_a_number_that_no_cameras_could_share():
    config = CompressConfig("none", keep=1, per_camera=True)
    Compressor(config, torch.arange(1, 9)[None], layers=3, images=2)
