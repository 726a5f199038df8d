"""The Triton kernels, run by Triton's interpreter on CPU, against their plain references."""

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding, apply_rotary_pos_emb

from actors.sampler.attention import slot_attention
from actors.sampler.cache import NO_WINDOW, AttentionInputs
from actors.sampler.fused_decoder import NormRule, add_norm, gate
from actors.sampler.sampling import Decoding, sample_tokens

pytest.importorskip("triton")


def naive_attention(query, keys, values, slots, positions, block_size, scale, window, causal=None):
    """One query at a time over the cache as it stands after the writes."""
    n, heads, queries, _ = query.shape
    group = heads // keys.shape[1]
    out = torch.zeros(n, queries, heads, query.shape[-1])
    for i in range(n):
        for q in range(queries):
            end = (int(positions[i, q]) // block_size + 1) * block_size
            if causal is not None and causal[i]:
                end = int(positions[i, q]) + 1
            first = max(int(positions[i, q]) - window + 1, 0)
            for h in range(heads if end else 0):
                k, v = keys[slots[i], h // group, first:end], values[slots[i], h // group, first:end]
                out[i, q, h] = torch.softmax(k @ query[i, h, q] * scale, 0) @ v
    return out


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "queries"), [(4, 2, 16, 4), (6, 2, 24, 4), (2, 1, 16, 40), (1, 1, 8, 1)]
)
@pytest.mark.parametrize("window", [NO_WINDOW, 6])
@pytest.mark.parametrize("causal", [None, torch.tensor([False, True, True, False, True])], ids=["blocks", "causal"])
def test_slot_attention_and_its_kernel_equal_one_query_at_a_time(heads, kv_heads, width, queries, window, causal):
    from actors.sampler.kernels.slot_attention import slot_attention_triton

    torch.manual_seed(0)
    block_size, rows = 4, 5
    slots = torch.tensor([2, 0, 2, 1, 3])  # slot 2 twice: a commit and the block behind it
    first = torch.tensor([4, 12, 8, 0, 20])
    positions = first[:, None] + torch.arange(queries)
    if queries == 40:
        positions[2, 7:] = -1  # padding of a shorter prompt
    query = torch.randn(rows, queries, heads, width).transpose(1, 2)  # the strides that projections give
    key, value = (torch.randn(rows, queries, kv_heads, width).transpose(1, 2) for _ in range(2))
    empty = torch.randn(2, 4, kv_heads, 64, width)
    if queries == 40:
        slots = torch.tensor([2, 0, 3, 1, 4])
        empty = torch.randn(2, 5, kv_heads, 64, width)
    expected_keys, expected_values = empty.clone()
    for i in range(rows):
        for q in range(queries):
            if positions[i, q] >= 0:
                expected_keys[slots[i], :, positions[i, q]] = key[i, :, q]
                expected_values[slots[i], :, positions[i, q]] = value[i, :, q]
    expected = naive_attention(query, expected_keys, expected_values, slots, positions, block_size, 0.3, window, causal)

    for attend in (slot_attention, slot_attention_triton):
        keys, values = empty.clone()
        inputs = (query, key, value, keys, values, slots, positions, block_size, 0.3, window, None, causal)
        out = attend(AttentionInputs(*inputs))
        torch.testing.assert_close(keys, expected_keys)
        torch.testing.assert_close(values, expected_values)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "queries"),
    [(4, 2, 16, 4), (9, 3, 24, 4), (3, 1, 8, 16), (1, 1, 8, 64)],
    ids=["pairs", "threes", "long-blocks", "longest-blocks"],
)
@pytest.mark.parametrize("window", [NO_WINDOW, 6])
@pytest.mark.parametrize("fused", ["", "rope", "norms", "centred-norms"])
@pytest.mark.parametrize("causal", [None, torch.tensor([False, False, False, True, True])], ids=["blocks", "causal"])
def test_a_row_and_its_partner_in_one_program_equal_rows_of_their_own(
    heads, kv_heads, width, queries, window, fused, causal
):
    from actors.sampler.kernels.block_attention import Fusion, block_attention_triton

    torch.manual_seed(0)
    slots = torch.tensor([2, 0, 1, 0, 3])  # row 3 commits the block before row 1's; row 4 is padding
    first = torch.tensor([queries, 3 * queries, 0, 2 * queries, -1])
    positions = torch.where(first[:, None] >= 0, first[:, None] + torch.arange(queries), -1)
    partner = torch.tensor([-1, 3, -1])
    packed = torch.randn(5, queries, heads + 2 * kv_heads, width)
    query, key, value = packed.split([heads, kv_heads, kv_heads], dim=2)  # as a packed projection gives them
    fusion = None
    queries_and_keys = query.transpose(1, 2), key.transpose(1, 2)
    if fused:
        config = Qwen3Config(
            head_dim=width, max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 100.0}
        )
        cos, sin = Qwen3RotaryEmbedding(config)(packed, positions)
        normed, weights = queries_and_keys, None
        if fused != "rope":
            norm = Gemma3RMSNorm if fused == "centred-norms" else Qwen3RMSNorm
            norms = [norm(width, 1e-6).requires_grad_(False) for _ in range(2)]
            for each in norms:
                torch.nn.init.normal_(each.weight)
            normed = norms[0](query).transpose(1, 2), norms[1](key).transpose(1, 2)
            weights = norms[0].weight, norms[1].weight
        fusion = Fusion(cos, sin, weights, 1e-6, fused == "centred-norms")
        expected_queries_and_keys = apply_rotary_pos_emb(*normed, cos, sin)
    else:
        expected_queries_and_keys = queries_and_keys
    empty = torch.randn(2, 4, kv_heads, 4 * queries, width)
    rows = (slots, positions, queries, 0.3, window, partner, causal)
    keys, values = empty.clone()
    value = value.transpose(1, 2)
    expected = slot_attention(AttentionInputs(*expected_queries_and_keys, value, keys, values, *rows))
    fast_keys, fast_values = empty.clone()
    inputs = AttentionInputs(*queries_and_keys, value, fast_keys, fast_values, *rows)
    out = block_attention_triton(inputs, fusion)
    torch.testing.assert_close((out[:4], fast_keys, fast_values), (expected[:4], keys, values))


@pytest.mark.parametrize("width", [24, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("norm", [Qwen3RMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("post", [False, True])
def test_add_norm_kernel_equals_its_reference(width, dtype, norm, post):
    from actors.sampler.kernels.layers import add_norm_triton

    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 4, width).to(dtype)
    y *= 3
    norms = [norm(width, 1e-6).requires_grad_(False).to(dtype) for _ in range(2)]
    for each in norms:
        torch.nn.init.normal_(each.weight)
    rule = NormRule(1e-6, norm is Gemma3RMSNorm)
    expected = add_norm(x, y, norms[0], rule, norms[1] if post else None)
    got = add_norm_triton(x, y, norms[0].weight, *rule, norms[1].weight if post else None)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("width", [24, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tanh_gelu", [False, True])
def test_gate_kernel_equals_its_reference(width, dtype, tanh_gelu):
    from actors.sampler.kernels.layers import gate_triton

    torch.manual_seed(0)
    gate_up = (4 * torch.randn(3, 4, 2 * width)).to(dtype)
    gate_up[0, 0, :2] = torch.tensor([-200.0, 200.0])
    torch.testing.assert_close(gate_triton(gate_up, tanh_gelu), gate(gate_up, tanh_gelu), atol=1e-5, rtol=1e-2)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("vocabulary", [50, 4096, 9000])
def test_sampling_kernel_equals_the_plain_function(temperature, vocabulary):
    from actors.sampler.kernels.sampling import sample_tokens_triton

    torch.manual_seed(1)
    logits = 4 * torch.randn(6, 4, vocabulary)
    mask = vocabulary - 3
    logits[..., mask] = 30  # never sampled, but it counts in the confidence
    logits[0, 0, vocabulary // 2] = 60
    noise = torch.rand(6, 4).clamp(1e-6, 1 - 1e-6)
    noise[1] = torch.tensor([2.0**-25, 0.5, 1 - 2.0**-25, 0.25])
    tokens, confidence = sample_tokens_triton(logits, noise, temperature, mask)
    expected, expected_confidence, _ = sample_tokens(logits, noise, Decoding(temperature=temperature), mask)
    assert (tokens != mask).all()
    # a uniform number within rounding of a step of the CDF may fall either way
    same = tokens == expected
    assert same.float().mean() > 0.9
    assert same[0, 0]
    torch.testing.assert_close(confidence[same], expected_confidence[same])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("known", [40, 4096, 4100, 8999])
def test_sampling_kernel_takes_no_id_without_a_token(temperature, known):
    """The largest logits stand behind the last token, in its chunk and in later ones; they count in the confidence."""
    from actors.sampler.kernels.sampling import sample_tokens_triton

    torch.manual_seed(2)
    logits = 3 * torch.randn(30, 9000)
    logits[:, known:] += 9
    noise, decoding = torch.rand(30).clamp(1e-6, 1 - 1e-6), Decoding(temperature=temperature)
    tokens, confidence = sample_tokens_triton(logits, noise, temperature, 5, known)
    expected, expected_confidence, _ = sample_tokens(logits, noise, decoding, 5, known)
    assert (tokens < known).all() and (expected < known).all()
    same = tokens == expected
    assert same.float().mean() > 0.9
    torch.testing.assert_close(confidence[same], expected_confidence[same])
    raw = logits.log_softmax(-1).gather(1, expected[:, None])[:, 0].exp()
    torch.testing.assert_close(expected_confidence, raw)


def test_sampling_kernel_takes_the_lowest_of_equal_ids():
    """Exact ties within a chunk and across chunks, as the plain function takes them; the mask token never."""
    from actors.sampler.kernels.sampling import CHUNK, sample_tokens_triton

    logits = torch.zeros(4, 2 * CHUNK + 10)
    logits[1, [7, 9, CHUNK + 1]] = 3
    logits[2, [CHUNK + 1, CHUNK + 5, 2 * CHUNK + 3]] = 3
    noise, mask = torch.full((4,), 0.5), 0
    tokens, confidence = sample_tokens_triton(logits, noise, 0.0, mask)
    assert tokens.tolist() == [1, 7, CHUNK + 1, 1]
    expected = sample_tokens(logits, noise, Decoding(temperature=0.0), mask)
    assert tokens.tolist() == expected.tokens.tolist()
    torch.testing.assert_close(confidence, expected.confidence)


def test_sampling_kernel_follows_the_distribution():
    from actors.sampler.kernels.sampling import sample_tokens_triton

    count = 200
    logits = torch.randn(1, 5000).expand(count, -1).contiguous() * 3
    noise = (torch.arange(count) + 0.5) / count
    tokens, _ = sample_tokens_triton(logits, noise, 1.0, 17)
    weights = logits[0].double().clone()
    weights[17] = -torch.inf
    cdf = torch.softmax(weights, 0).cumsum(0)
    rounding = 1e-5
    assert (noise <= cdf[tokens] + rounding).all()
    assert (noise >= cdf[tokens] - torch.softmax(weights, 0)[tokens] - rounding).all()


def test_sampling_kernel_reports_what_is_not_finite():
    from actors.sampler.kernels.sampling import sample_tokens_triton

    logits = torch.full((2, 100), float("nan"))
    _, confidence = sample_tokens_triton(logits, torch.full((2,), 0.5), 1.0, 3)
    assert not torch.isfinite(confidence).any()
