"""The Triton kernel of a decoding pass: attention of a slot's new blocks over its cached ones.

A program computes one slot, one key-value head and a few of its query heads, for a block being committed and the block
behind it together, so that their cache is read once. It stores the new keys and values and attends to them from
registers. With `Fusion` it also norms and rotates queries and keys, which are then given as the projections left them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.sampler.cache import AttentionInputs
from actors.sampler.kernels.layers import scaled
from actors.sampler.kernels.softmax import attend_to


class Fusion(NamedTuple):
    """Norms of query and key heads where they have some, then RoPE."""

    cos: Tensor  # [N, Q, D]
    sin: Tensor  # [N, Q, D]
    weights: tuple[Tensor, Tensor] | None  # of the norms of queries and keys, each [D]
    epsilon: float
    centred: bool  # see Family in actors/sampler/fused_decoder.py


def block_attention_triton(inputs: AttentionInputs, fusion: Fusion | None = None) -> Tensor:
    """Same result as `actors.sampler.attention.slot_attention_reference`, for Q <= MOST_QUERIES there.

    It needs `partner`. The new positions of a slot must be its last, without a gap.
    """
    query, key, value, keys, values, slots, positions, block_size, scale, window, partner, causal = inputs
    assert partner is not None
    n, heads, queries, width = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    half = query.dtype != torch.float32
    together = max(1, min(32 // (2 * queries), group))
    tile = max(16, triton.next_power_of_2(2 * queries * together))
    wide = width > 128  # fewer keys at a time fit a multiprocessor's shared memory, and more warps hold the sums
    # measured on an H200: with these registers and shared memory, eight programs of tile 16 fit a multiprocessor
    small, most_registers = half and tile <= 32, 128 if half and tile == 16 and not wide else None
    keys_at_once = 64 if half and not small and not wide else 32
    stages = 3 if half and tile > 16 and (small or not wide) else 2
    warps = (2 if small else 4) * (2 if wide else 1)
    out = query.new_empty(n, queries, heads, width)
    cos, sin, weights, epsilon, centred = fusion or Fusion(query, query, None, 0.0, False)  # not read
    query_weight, key_weight = weights or (query, query)
    _attend[(triton.cdiv(group, together), kv_heads, len(partner))](
        query, key, value, keys, values, out, slots, positions, partner,
        query_weight, key_weight, cos, sin, epsilon, scale,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *keys.stride()[:3], *positions.stride(),
        block_size, window, positions if causal is None else causal, queries, group, together, width,
        CAUSAL=causal is not None, FUSED=fusion is not None, HEAD_NORMS=weights is not None, CENTRED=centred,
        NEW=max(16, triton.next_power_of_2(2 * queries)), TILE=tile,
        HALF=max(16, triton.next_power_of_2(width // 2)), WIDTH=max(16, triton.next_power_of_2(width)),
        KEYS=keys_at_once, PRECISION="tf32" if half else "ieee",
        num_warps=warps, num_stages=stages, maxnreg=most_registers,
    )  # fmt: skip
    return out


@triton.jit
def _attend(
    query, key, value, keys, values, out, slots, positions, partner,
    query_weight, key_weight, cos, sin, epsilon, scale,
    query_n, query_h, query_q, key_n, key_h, key_q, value_n, value_h, value_q,
    cache_s, cache_h, cache_j, position_n, position_q,
    block_size, window, causal, queries: tl.constexpr, group: tl.constexpr, together: tl.constexpr, width: tl.constexpr,
    CAUSAL: tl.constexpr, FUSED: tl.constexpr, HEAD_NORMS: tl.constexpr, CENTRED: tl.constexpr,
    NEW: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2)
    h = tl.program_id(1)
    half = width // 2
    e = tl.arange(0, HALF)  # of a half of a head: RoPE mixes its two halves
    within = (e < half)[None, :]
    d = tl.arange(0, WIDTH)
    inside = (d < width)[None, :]
    other = tl.load(partner + n)
    slot = tl.load(slots + n) * cache_s + h * cache_h

    # the new positions: of the row, then of its partner
    new = tl.arange(0, NEW)
    new_row = tl.where(new < queries, n, other)
    known = (new < 2 * queries) & (new_row >= 0)
    new_row = tl.where(known, new_row, 0).to(tl.int64)
    new_q = new % queries
    place = tl.load(positions + new_row * position_n + new_q * position_q, mask=known, other=-1).to(tl.int32)
    known = (place >= 0)[:, None]
    cached = tl.min(tl.where(place >= 0, place, 1 << 30), 0)
    cached = tl.where(cached == 1 << 30, 0, cached)

    # first the queries of `together` heads of the row, then those of its partner
    m = tl.arange(0, TILE)
    row = tl.where(m < together * queries, n, other)
    member = tl.program_id(0) * together + (m // queries) % together
    used = (m < 2 * together * queries) & (row >= 0) & (member < group)
    row = tl.where(used, row, 0).to(tl.int64)
    q = m % queries
    head = h * group + tl.where(used, member, 0)
    position = tl.load(positions + row * position_n + q * position_q, mask=used, other=-1).to(tl.int32)
    source = query + (row * query_n + head * query_h + q * query_q)[:, None] + e[None, :]
    asked = used[:, None] & within
    low = tl.load(source, mask=asked, other=0.0)
    high = tl.load(source + half, mask=asked, other=0.0)

    # the new keys and values before the cache: they are loaded at the same time as the queries
    source = key + (new_row * key_n + h * key_h + new_q * key_q)[:, None] + e[None, :]
    new_low = tl.load(source, mask=known & within, other=0.0)
    new_high = tl.load(source + half, mask=known & within, other=0.0)
    source = value + (new_row * value_n + h * value_h + new_q * value_q)[:, None] + d[None, :]
    new_value = tl.load(source, mask=known & inside, other=0.0)
    if FUSED:
        if HEAD_NORMS:
            low, high = _norm(low, high, query_weight, epsilon, e, width, CENTRED)
            new_low, new_high = _norm(new_low, new_high, key_weight, epsilon, e, width, CENTRED)
        low, high = _rope(low, high, cos, sin, row * queries + q, asked, e, width)
        new_low, new_high = _rope(new_low, new_high, cos, sin, new_row * queries + new_q, known & within, e, width)
    if tl.program_id(0) == 0:
        target = slot + place.to(tl.int64)[:, None] * cache_j
        tl.store(keys + target + e[None, :], new_low, mask=known & within)
        tl.store(keys + target + half + e[None, :], new_high, mask=known & within)
        tl.store(values + target + d[None, :], new_value, mask=known & inside)

    highest = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    sums = tl.zeros([TILE, WIDTH], tl.float32)
    visible = tl.where(position < 0, 0, (position // block_size + 1) * block_size)
    if CAUSAL:
        visible = tl.where(tl.load(causal + row), position + 1, visible)
    seen = (place >= 0)[None, :] & (place[None, :] < visible[:, None])
    seen = seen & (position[:, None] - place[None, :] < window)
    own = tl.dot(low, tl.trans(new_low), input_precision=PRECISION)
    own = tl.dot(high, tl.trans(new_high), own, input_precision=PRECISION) * scale
    highest, total, sums = attend_to(own, seen, new_value, highest, total, sums, PRECISION)

    for start in range(0, cached, KEYS):
        j = start + tl.arange(0, KEYS)
        before = (j < cached)[None, :] & (position >= 0)[:, None] & (position[:, None] - j[None, :] < window)
        stored = (j < cached)[:, None]
        entry = slot + j[:, None] * cache_j  # within a slot's head, 32 bits are enough
        k_low = tl.load(keys + entry + e[None, :], mask=stored & within, other=0.0)
        k_high = tl.load(keys + entry + half + e[None, :], mask=stored & within, other=0.0)
        v = tl.load(values + entry + d[None, :], mask=stored & inside, other=0.0)
        score = tl.dot(low, tl.trans(k_low), input_precision=PRECISION)
        score = tl.dot(high, tl.trans(k_high), score, input_precision=PRECISION) * scale
        highest, total, sums = attend_to(score, before, v, highest, total, sums, PRECISION)

    result = tl.where(total[:, None] > 0, sums / total[:, None], 0.0)
    target = out + ((row * queries + q) * (group * tl.num_programs(1)) + head)[:, None] * width + d[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=used[:, None] & inside)


@triton.jit
def _norm(low, high, weight, epsilon, e, width: tl.constexpr, CENTRED: tl.constexpr):
    """The two halves [M, D / 2] of heads after RMSNorm, rounded where the modules round."""
    kind = low.dtype
    half = width // 2
    low = low.to(tl.float32)
    high = high.to(tl.float32)
    shrink = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / width + epsilon)[:, None]
    low_weight = tl.load(weight + e, mask=e < half, other=0.0)[None, :]
    high_weight = tl.load(weight + half + e, mask=e < half, other=0.0)[None, :]
    return scaled(low * shrink, low_weight, kind, CENTRED), scaled(high * shrink, high_weight, kind, CENTRED)


@triton.jit
def _rope(low, high, cos, sin, angle, there, e, width: tl.constexpr):
    """The two halves [M, D / 2] of heads after RoPE, rounded once."""
    kind = low.dtype
    turn = angle[:, None] * width + e[None, :]  # RoPE rotates both halves by the same angles
    c = tl.load(cos + turn, mask=there, other=0.0).to(tl.float32)
    s = tl.load(sin + turn, mask=there, other=0.0).to(tl.float32)
    low = low.to(tl.float32)
    high = high.to(tl.float32)
    return (low * c - high * s).to(kind), (high * c + low * s).to(kind)
