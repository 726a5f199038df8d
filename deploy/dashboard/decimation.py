"""Fewer points for a chart that looks the same: the lowest and the highest value of each bucket are kept."""

from __future__ import annotations

from itertools import pairwise

import numpy as np


def moving_average(y: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value and the `width` - 1 before it (fewer at the start); NaN counts as absent. float64 [n]."""
    known = ~np.isnan(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    end = np.arange(1, len(y) + 1)
    begin = np.maximum(end - width, 0)
    count = counts[end] - counts[begin]
    return np.where(count > 0, (sums[end] - sums[begin]) / np.maximum(count, 1), np.nan)


def min_max(x: np.ndarray, y: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` of the points (x, y), in their order; the first, the last and every spike are kept.

    Args:
        x, y: float64 [n], x ascending; y may hold NaN, which only a bucket without any number keeps.
        points: at least 4.
    """
    if len(x) <= points:
        return x, y
    buckets = (points - 2) // 2
    edges = np.linspace(1, len(x) - 1, buckets + 1).astype(int)
    low = np.where(np.isnan(y), np.inf, y)
    high = np.where(np.isnan(y), -np.inf, y)
    kept = [0, len(x) - 1]
    for begin, end in pairwise(edges.tolist()):
        kept += [begin + int(low[begin:end].argmin()), begin + int(high[begin:end].argmax())]
    order = np.unique(kept)
    return x[order], y[order]
