"""The running softmax of the attention kernels (Milakov and Gimelshein, 2018, arXiv 1805.02867)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_to(score, seen, v, highest, total, sums, PRECISION: tl.constexpr):
    """Take in one more tile: `score` [M, K] of the keys, bool `seen` [M, K] and values `v` [K, D].

    The running `highest` score [M], `total` weight [M] and weighted `sums` [M, D] are float32; returns the new ones.
    """
    score = tl.where(seen, score, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(score, 1))
    reference = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # a query that has seen no key yet
    weight = tl.exp(score - reference[:, None])
    shrink = tl.exp(highest - reference)
    total = total * shrink + tl.sum(weight, 1)
    sums = sums * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
    return new_highest, total, sums
