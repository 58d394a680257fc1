"""The decoder against transformers' LlamaForCausalLM, and its cache against itself. Everything in float32."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from mllm.config import DecoderConfig  # noqa: E402
from mllm.decoder import Kept, KVCache, LanguageModel  # noqa: E402
from mllm.tensor_names import PARTS  # noqa: E402
from mllm.torchvision_import import import_timm  # noqa: E402

SIZES = {"grouped": (64, 96, 3, 4, 2), "all-heads": (64, 96, 3, 4, 4), "one-kv-head": (96, 128, 4, 6, 1)}


@pytest.fixture(params=SIZES, scope="module")
def models(request):
    """Ours and transformers', with the same weights."""
    import_timm()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = DecoderConfig(*SIZES[request.param], vocab_size=130, max_position_embeddings=128, rms_norm_eps=1e-5)
    names = {key: getattr(config, key) for key in config.__dataclass_fields__ if key != "rope_theta"}
    theirs = LlamaForCausalLM(LlamaConfig(**names, pad_token_id=0)).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.08).add_(1.0 if parameter.dim() == 1 else 0.0)
    ours = LanguageModel(config).eval()
    weights = theirs.state_dict()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            part = next((part for part in PARTS if part in name), None)
            if part:
                parameter.copy_(torch.cat([weights[name.replace(part, source)] for source in PARTS[part]]))
            else:
                parameter.copy_(weights[name])
    return ours, theirs


def close(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def logits(model, hidden, positions, **options):
    return model.logits(model.model(hidden, positions, **options))


@torch.no_grad()
def test_logits_equal_transformers(models):
    ours, theirs = models
    ids = torch.randint(0, 130, (3, 17))
    answer = logits(ours, ours.model.embed_tokens(ids), torch.arange(17)[None])
    assert close(answer, theirs(ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_no_real_position(models, side):
    ours, theirs = models
    ids = torch.randint(1, 130, (4, 15))
    lengths = torch.tensor([15, 3, 9, 1])
    slots = torch.arange(15)[None]
    valid = slots < lengths[:, None] if side == "right" else slots >= 15 - lengths[:, None]
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    cache = KVCache(ours.model.config, 4, 20)
    answer = logits(ours, ours.model.embed_tokens(ids), positions, valid=valid, cache=cache)
    expected = theirs(ids, attention_mask=valid.long(), position_ids=positions).logits
    assert torch.isfinite(answer).all()
    assert close(answer[valid], expected[valid])
    for sample in range(4):
        alone = theirs(ids[sample][valid[sample]][None]).logits[0]
        assert close(answer[sample][valid[sample]], alone)
    # One more token after the padding: as if there were none.
    token = torch.randint(1, 130, (4, 1))
    step = logits(ours, ours.model.embed_tokens(token), lengths[:, None], cache=cache)
    for sample in range(4):
        alone = theirs(torch.cat([ids[sample][valid[sample]], token[sample]])[None]).logits[0, -1]
        assert close(step[sample, 0], alone)


@pytest.mark.parametrize("chunks", [[12] + [1] * 6, [5, 7, 1, 3, 2], [1] * 18])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(models, chunks):
    ours, theirs = models
    ids = torch.randint(0, 130, (2, 18))
    cache = KVCache(ours.model.config, 2, 18)
    hidden, answers, start = ours.model.embed_tokens(ids), [], 0
    for count in chunks:
        positions = torch.arange(start, start + count)[None]
        answers.append(logits(ours, hidden[:, start : start + count], positions, cache=cache))
        start += count
    assert close(torch.cat(answers, 1), theirs(ids).logits)


@pytest.mark.parametrize("last", [1, 4, 11, 50])
@torch.no_grad()
def test_asking_for_the_last_outputs_only_changes_none_of_them(models, last):
    ours, _ = models
    hidden, positions = torch.randn(2, 11, ours.model.config.hidden_size), torch.arange(11)[None]
    valid = torch.ones(2, 11, dtype=torch.bool)
    valid[1, 4:6] = False
    for options in ({}, {"valid": valid}, {"bidirectional": 3}):
        whole = ours.model(hidden, positions, **options)
        assert torch.allclose(ours.model(hidden, positions, last=last, **options), whole[:, -last:], atol=1e-5)


@torch.no_grad()
def test_a_cache_of_another_size_goes_on_where_it_was(models):
    ours, _ = models
    hidden, step, places = torch.randn(2, 7, ours.model.config.hidden_size), torch.tensor([[6]]), torch.arange(6)[None]
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 2] = False
    answers = []
    for capacity in (None, 7, 20):
        cache = KVCache(ours.model.config, 2, 9)
        ours.model(hidden[:, :6], places, valid=valid, cache=cache)
        before = cache.bytes
        if capacity:
            with pytest.raises(ValueError, match="6 slots are used: they do not fit 5"):
                cache.resize(5)
            cache.resize(capacity)
            assert cache.bytes == before // 9 * capacity
        answers.append(ours.model(hidden[:, 6:], step, cache=cache))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


@torch.no_grad()
def test_the_cache_refuses_what_does_not_fit_it_and_serves_again_once_cleared(models):
    ours, _ = models
    cache = KVCache(ours.model.config, 1, 8)
    hidden = torch.randn(1, 6, ours.model.config.hidden_size)
    first = ours.model(hidden, torch.arange(6)[None], cache=cache)
    with pytest.raises(ValueError, match=r"12 positions do not fit the cache's 8 slots"):
        ours.model(hidden, torch.arange(6)[None], cache=cache)
    cache.clear()
    assert torch.equal(ours.model(hidden, torch.arange(6)[None], cache=cache), first)


@torch.no_grad()
def test_bidirectional_slots_see_one_another_and_the_prompt_sees_none_of_them(models):
    ours, _ = models
    hidden, positions = torch.randn(1, 10, ours.model.config.hidden_size), torch.arange(10)[None]
    whole = ours.model(hidden, positions, bidirectional=4)
    changed = hidden.clone()
    changed[:, 9] += 1
    other = ours.model(changed, positions, bidirectional=4)
    assert torch.equal(other[:, :6], whole[:, :6])
    assert ((other[:, 6:] - whole[:, 6:]).abs().amax(-1) > 1e-4).all()
    # With every position in it: attention without any order, which transformers' mask of all ones gives too.
    _, theirs = models
    expected = theirs(inputs_embeds=hidden, attention_mask=torch.zeros(1, 1, 10, 10)).logits
    assert close(logits(ours, hidden, positions, bidirectional=10), expected)


def keep_all(state):
    index = torch.arange(state.hidden.shape[1]).expand(len(state.hidden), -1)
    return Kept(index) if state.layer == 2 else None


@torch.no_grad()
def test_a_hook_that_keeps_everything_changes_not_one_bit(models):
    ours, _ = models
    hidden, positions = torch.randn(2, 12, ours.model.config.hidden_size), torch.arange(12)[None]
    step = torch.randn(2, 1, ours.model.config.hidden_size)
    answers = []
    for hook in (None, keep_all, lambda state: None):
        cache = KVCache(ours.model.config, 2, 13)
        prefill = ours.model(hidden, positions, cache=cache, hook=hook)
        answers.append((prefill, ours.model(step, torch.tensor([[12]]), cache=cache)))
    for prefill, decoded in answers[1:]:
        assert torch.equal(prefill, answers[0][0])
        assert torch.equal(decoded, answers[0][1])


def reference_with_selection(ours, hidden, index, layer, merged=None):
    """Layers in turn on the kept rows only, each row at its own position: no cache, no shared mask code."""
    positions = torch.arange(hidden.shape[1])[None]
    for i, block in enumerate(ours.model.layers):
        if i == layer:
            positions = positions.expand(len(index), -1).gather(1, index)
            hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1])) if merged is None else merged
        rotary = ours.model.rotary(positions, hidden.dtype)
        query, key, value = block.self_attn.project(block.input_layernorm(hidden), rotary)
        hidden = hidden + block.self_attn.attend(query, key, value, None, True)
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return ours.model.norm(hidden)


@pytest.mark.parametrize("trim", [True, False])
@torch.no_grad()
def test_a_hook_drops_positions_and_decoding_goes_on_at_the_original_ones(models, trim):
    ours, _ = models
    size = ours.model.config.hidden_size
    hidden, step = torch.randn(2, 12, size), torch.randn(2, 1, size)
    index = torch.tensor([[0, 2, 3, 7, 11], [0, 1, 5, 8, 11]])
    states = []

    def hook(state):
        states.append(state)
        return Kept(index, trim=trim) if state.layer == 2 else None

    cache = KVCache(ours.model.config, 2, 13)
    answer = ours.model(hidden, torch.arange(12)[None], cache=cache, hook=hook)
    assert torch.allclose(answer, reference_with_selection(ours, hidden, index, 2), atol=1e-5)
    assert cache.used[:2] == ([5, 5] if trim else [12, 12])
    assert set(cache.used[2:]) == {5}
    assert torch.equal(states[-1].positions if len(states) > 2 else index, index)
    # The keys that layer 0 holds are those of the kept positions, in their order.
    first = ours.model.layers[0]
    _, key, _ = first.self_attn.project(
        first.input_layernorm(hidden), ours.model.rotary(torch.arange(12)[None], torch.float32)
    )
    rows = index[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3]) if trim else None
    expected = key.gather(2, rows) if trim else key
    assert torch.equal(cache.keys_values[0][0][:, :, : expected.shape[2]], expected)
    decoded = ours.model(step, torch.tensor([[12]]), cache=cache)
    assert decoded.shape == (2, 1, size)
    if trim:
        whole = decode_reference(ours, hidden, step, index)
        assert torch.allclose(decoded, whole, atol=1e-5)


def decode_reference(ours, hidden, step, index):
    """The step's output when every layer holds the kept positions of the prefill, computed without the cache."""
    position = torch.tensor([[12]])
    positions, prompt = torch.arange(12)[None], hidden
    for i, block in enumerate(ours.model.layers):
        if i == 2:
            positions = positions.expand(2, -1).gather(1, index)
            prompt = prompt.gather(1, index[..., None].expand(-1, -1, prompt.shape[-1]))
        query, key, value = block.self_attn.project(
            block.input_layernorm(prompt), ours.model.rotary(positions, torch.float32)
        )
        kept_key, kept_value = key, value
        if i < 2:
            rows = index[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
            kept_key, kept_value = key.gather(2, rows), value.gather(2, rows)
        own = block.self_attn.project(block.input_layernorm(step), ours.model.rotary(position, torch.float32))
        keys, values = torch.cat([kept_key, own[1]], 2), torch.cat([kept_value, own[2]], 2)
        step = step + block.self_attn.attend(own[0], keys, values, None, False)
        step = step + block.mlp(block.post_attention_layernorm(step))
        prompt = prompt + block.self_attn.attend(query, key, value, None, True)
        prompt = prompt + block.mlp(block.post_attention_layernorm(prompt))
    return ours.model.norm(step)


@torch.no_grad()
def test_samples_may_keep_differing_numbers_of_positions_and_merged_rows(models):
    ours, _ = models
    size = ours.model.config.hidden_size
    hidden = torch.randn(2, 10, size)
    merged = torch.randn(2, 6, size)
    index = torch.tensor([[0, 1, 2, 3, 8, 9], [0, 4, 5, 6, 8, 9]])
    valid = torch.tensor([[True] * 6, [True, True, False, False, True, True]])

    def hook(state):
        return Kept(index, merged, valid) if state.layer == 1 else None

    cache = KVCache(ours.model.config, 2, 12)
    answer = ours.model(hidden, torch.arange(10)[None], cache=cache, hook=hook)
    for sample, rows in enumerate(valid):
        alone = reference_with_selection(
            ours, hidden[sample : sample + 1], index[sample : sample + 1, rows], 1, merged[sample : sample + 1, rows]
        )
        assert torch.allclose(answer[sample, rows], alone[0], atol=1e-5)
    step = torch.randn(2, 1, size)
    together = ours.model(step, torch.tensor([[10]]), cache=cache)
    for sample, rows in enumerate(valid):
        alone = KVCache(ours.model.config, 1, 12)
        one = slice(sample, sample + 1)
        ours.model(
            hidden[one],
            torch.arange(10)[None],
            cache=alone,
            hook=lambda state, one=one, rows=rows: (
                Kept(index[one, rows], merged[one, rows]) if state.layer == 1 else None
            ),
        )
        assert torch.allclose(ours.model(step[one], torch.tensor([[10]]), cache=alone), together[one], atol=1e-5)


@torch.no_grad()
def test_a_hook_can_compute_the_attention_that_the_layer_before_it_paid(models):
    ours, _ = models
    hidden, positions = torch.randn(1, 9, ours.model.config.hidden_size), torch.arange(9)[None]
    seen = []

    def hook(state):
        seen.append(state)

    ours.model(hidden, positions, hook=hook)
    state = seen[0]
    block = ours.model.layers[state.layer - 1].self_attn
    key = state.key.repeat_interleave(block.heads // block.kv_heads, 1)
    weights = (state.query[:, :, -1:] @ key.transpose(2, 3) / block.size**0.5).softmax(-1)
    _, _, value = block.project(
        ours.model.layers[0].input_layernorm(hidden), ours.model.rotary(positions, torch.float32)
    )
    mixed = weights @ value.repeat_interleave(block.heads // block.kv_heads, 1)
    assert torch.allclose(block.o_proj(mixed.transpose(1, 2).reshape(1, 1, -1)), state.attention[:, -1:], atol=1e-5)


def test_gradients_flow_through_every_parameter(models):
    ours, _ = models
    ids = torch.randint(0, 130, (2, 7))
    answer = logits(ours, ours.model.embed_tokens(ids), torch.arange(7)[None])
    answer.logsumexp(-1).sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    ours.zero_grad()
