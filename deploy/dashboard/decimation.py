"""Fewer points for a chart that looks the same: per bucket the lowest and the highest value stay."""

from __future__ import annotations

import numpy as np


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
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        kept += [begin + int(low[begin:end].argmin()), begin + int(high[begin:end].argmax())]
    order = np.unique(kept)
    return x[order], y[order]
