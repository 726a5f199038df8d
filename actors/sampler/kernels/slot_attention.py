"""Triton kernels of attention over the slot cache, for rows of any length; actors/sampler/attention.py has the
reference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.sampler.cache import AttentionInputs
from actors.sampler.kernels.softmax import attend_to


def slot_attention_triton(inputs: AttentionInputs) -> Tensor:
    """Same result as `actors.sampler.attention.slot_attention_reference`.

    A program computes one row, one key-value head and a tile of queries. It reads the slot's keys only as far as its
    queries see.
    """
    query, key, value, keys, values, slots, positions, block_size, scale, window, _, causal = inputs
    n, heads, queries, width = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    half = query.dtype != torch.float32
    padded = triton.next_power_of_2(width)
    out = query.new_empty(n, queries, heads, width)
    _store[(n * queries, kv_heads)](
        key, value, keys, values, slots, positions,
        *key.stride(), *value.stride(), *keys.stride()[:3], *positions.stride(),
        queries, width, WIDTH=padded,
    )  # fmt: skip
    tile = 16 if group * queries <= 16 else 64
    small = half and tile == 16
    _attend[(triton.cdiv(group * queries, tile), kv_heads, n)](
        query, keys, values, out, slots, positions, scale,
        *query.stride(), *keys.stride()[:3], *positions.stride(),
        queries, group, block_size, window, width, positions if causal is None else causal,
        CAUSAL=causal is not None,
        TILE=tile, WIDTH=padded, KEYS=64 if half and not small else 32, PRECISION="tf32" if half else "ieee",
        num_warps=2 if small else 4, num_stages=3 if half else 2,
    )  # fmt: skip
    return out


@triton.jit
def _store(
    key, value, keys, values, slots, positions,
    key_n, key_h, key_q, key_d, value_n, value_h, value_q, value_d,
    cache_s, cache_h, cache_j, position_n, position_q,
    queries, width, WIDTH: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) // queries
    q = tl.program_id(0) % queries
    h = tl.program_id(1)
    position = tl.load(positions + n * position_n + q * position_q)
    if position >= 0:
        d = tl.arange(0, WIDTH)
        inside = d < width
        at = tl.load(slots + n) * cache_s + h * cache_h + position * cache_j + d
        new_key = tl.load(key + n * key_n + h * key_h + q * key_q + d * key_d, mask=inside)
        new_value = tl.load(value + n * value_n + h * value_h + q * value_q + d * value_d, mask=inside)
        tl.store(keys + at, new_key, mask=inside)
        tl.store(values + at, new_value, mask=inside)


@triton.jit
def _attend(
    query, keys, values, out, slots, positions, scale,
    query_n, query_h, query_q, query_d, cache_s, cache_h, cache_j, position_n, position_q,
    queries, group, block_size, window, width, causal,
    CAUSAL: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2)
    h = tl.program_id(1)
    d = tl.arange(0, WIDTH)
    inside = d < width
    slot = tl.load(slots + n) * cache_s + h * cache_h
    m = tl.program_id(0) * TILE + tl.arange(0, TILE)
    member = m // queries
    used = member < group
    row = tl.zeros([TILE], tl.int64) + n
    q = m % queries
    head = h * group + tl.where(used, member, 0)

    position = tl.load(positions + row * position_n + q * position_q, mask=used, other=-1)
    visible = tl.where(position < 0, 0, (position // block_size + 1) * block_size)
    if CAUSAL:
        visible = tl.where(tl.load(causal + n), position + 1, visible)
    x = tl.load(
        query + (row * query_n + head * query_h + q * query_q)[:, None] + d[None, :] * query_d,
        mask=used[:, None] & inside[None, :],
        other=0.0,
    )
    highest = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    sums = tl.zeros([TILE, WIDTH], tl.float32)
    for start in range(0, tl.max(visible, 0), KEYS):
        j = (start + tl.arange(0, KEYS)).to(tl.int64)
        seen = (j[None, :] < visible[:, None]) & (position[:, None] - j[None, :] < window)
        there = (j < tl.max(visible, 0))[:, None] & inside[None, :]
        at = slot + j[:, None] * cache_j + d[None, :]
        k = tl.load(keys + at, mask=there, other=0.0)
        score = tl.dot(x, tl.trans(k), input_precision=PRECISION) * scale
        v = tl.load(values + at, mask=there, other=0.0)
        highest, total, sums = attend_to(score, seen, v, highest, total, sums, PRECISION)
    result = tl.where(total[:, None] > 0, sums / total[:, None], 0.0)
    target = out + ((row * queries + q) * (group * tl.num_programs(1)) + head)[:, None] * width
    tl.store(target + d[None, :], result.to(out.dtype.element_ty), mask=used[:, None] & inside[None, :])
