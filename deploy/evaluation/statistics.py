"""Metrics of responses with their deviations: every metric is a ratio of sums over the problems.

- Deviation over seeds: each seed's metric, n - 1 in the denominator. For one seed the standard deviation over 2,000
  bootstrap resamples of the problems (Efron, 1979).
- 95% interval of a share of problems, one response each: Wilson's (1927). Of everything else: the 2.5th and 97.5th
  percentile of the resamples. Problems are resampled with all their responses, since those are not independent.
- Difference of two rows: both are resampled with the same problems each time, so what they have in common drops out.
- pass@k of n responses to a problem, c of them right: 1 - C(n-c, k) / C(n, k), which is unbiased (Chen et al., 2021,
  arXiv 2107.03374).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 2000
_AT_A_TIME = 100  # resamples that are computed together
_Z = 1.959963984540054  # of 95%

# metric: (numerator, denominator), columns of `Counts`
DECODING: dict[str, tuple[str, str]] = {
    "tokens_per_step": ("tokens", "denoise"),
    "forwards_per_token": ("denoise", "tokens"),
    "forwards_per_token_with_commits": ("forwards", "tokens"),
    "response_tokens_mean": ("tokens", "responses"),
    "share_ended": ("ended", "responses"),
}
Interval = tuple[float, float]


@dataclass(frozen=True)
class Counts:
    """Sums over the responses to each problem, by seed: float64 [seeds, problems] each, all columns alike."""

    columns: Mapping[str, np.ndarray]

    @property
    def problems(self) -> int:
        return next(iter(self.columns.values())).shape[1]

    def totals(self, name: str) -> np.ndarray:
        """float64 [problems], over all seeds."""
        return self.columns[name].sum(axis=0)


def ratio(numerator: float, denominator: float) -> float | None:
    """None where nothing was counted."""
    return float(numerator / denominator) if denominator else None


def by_seed(counts: Counts, metric: tuple[str, str]) -> list[float | None]:
    numerator, denominator = (counts.columns[name].sum(axis=1) for name in metric)
    return [ratio(n, d) for n, d in zip(numerator, denominator, strict=True)]


def mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def deviation(counts: Counts, metric: tuple[str, str]) -> float | None:
    """Over seeds, or over resamples of the problems where there is one."""
    values = [value for value in by_seed(counts, metric) if value is not None]
    if len(values) > 1:
        return statistics.stdev(values)
    resampled = _resampled(counts, metric)
    return float(resampled.std(ddof=1)) if len(resampled) else None


def interval(counts: Counts, metric: tuple[str, str]) -> Interval | None:
    """The 95% interval; None where nothing was counted."""
    numerator, denominator = (counts.totals(name) for name in metric)
    if not denominator.any():
        return None
    if np.isin(numerator, (0, 1)).all() and np.isin(denominator, (0, 1)).all() and (numerator <= denominator).all():
        return wilson(int(numerator.sum()), int(denominator.sum()))
    return _percentiles(_resampled(counts, metric))


def difference(counts: Counts, other: Counts, metric: tuple[str, str]) -> tuple[float, Interval] | None:
    """counts minus other, with its 95% interval by the paired bootstrap; None where one has nothing counted.

    Raises:
        ValueError: they are not of the same number of problems.
    """
    if counts.problems != other.problems:
        raise ValueError(f"{counts.problems} problems cannot be paired with {other.problems}")
    ours, theirs = (mean_of(by_seed(each, metric)) for each in (counts, other))
    if ours is None or theirs is None:
        return None
    resampled = _resampled(counts, metric, drop=False) - _resampled(other, metric, drop=False)
    return ours - theirs, _percentiles(resampled[np.isfinite(resampled)])


def wilson(right: int, of: int) -> Interval:
    """Wilson's score interval of a share."""
    share, z2 = right / of, _Z**2
    centre = share + z2 / (2 * of)
    half = _Z * math.sqrt(share * (1 - share) / of + z2 / (4 * of**2))
    low, high = ((centre + sign * half) / (1 + z2 / of) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def pass_at(k: int, right: np.ndarray, of: int) -> np.ndarray:
    """The unbiased estimate for each problem, float64 of the shape of `right` (how many of its `of` responses are)."""
    table = np.array([1 - math.comb(of - c, k) / math.comb(of, k) for c in range(of + 1)])
    return table[right.astype(int)]


def _percentiles(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _resampled(counts: Counts, metric: tuple[str, str], drop: bool = True) -> np.ndarray:
    """The metric, all seeds together, on sets of equally many problems drawn with replacement: float64 [resamples].

    The sets are the same for equal numbers of problems. `drop` leaves out sets in which nothing was counted.
    """
    sums = np.stack([counts.totals(name) for name in metric], axis=1)
    times = _times(counts.problems)
    numerator, denominator = np.concatenate(
        [times[first : first + _AT_A_TIME].astype(np.float64) @ sums for first in range(0, RESAMPLES, _AT_A_TIME)]
    ).T
    with np.errstate(divide="ignore", invalid="ignore"):
        values = numerator / denominator
    return values[np.isfinite(values)] if drop else values


@lru_cache(maxsize=2)
def _times(problems: int) -> np.ndarray:
    """How often each problem is in each set: uint16 [resamples, problems]."""
    rng = np.random.default_rng(0)
    even = np.full(problems, 1 / problems)
    parts = [rng.multinomial(problems, even, size=_AT_A_TIME) for _ in range(RESAMPLES // _AT_A_TIME)]
    return np.concatenate([part.astype(np.uint16) for part in parts])
