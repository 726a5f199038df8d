"""Lengths as uneven as those of real responses: log-normal, as quantiles, so that every drawing has the same mean."""

from __future__ import annotations

import numpy as np
import torch

SIGMA = 0.85


def quantiles(count: int) -> np.ndarray:
    """float64 [count], rising: of the log-normal distribution with median 1."""
    normal = torch.distributions.Normal(0.0, 1.0)
    at = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return np.exp(SIGMA * normal.icdf(at).numpy())


def uneven_lengths(mean: float, count: int) -> list[int]:
    """Whole numbers of that mean up to rounding, in a mixed but fixed order."""
    drawn = quantiles(count)
    lengths = np.maximum(np.rint(drawn * mean / drawn.mean()), 1).astype(int)
    return np.random.default_rng(0).permutation(lengths).tolist()
