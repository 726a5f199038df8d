"""Deviations, intervals and pass@k against closed forms and simulations."""

from itertools import combinations

import numpy as np
import pytest

from deploy.evaluation import statistics
from deploy.evaluation.statistics import Counts

SHARE = ("right", "of")


def counts(right: np.ndarray, of: np.ndarray | None = None) -> Counts:
    right = np.atleast_2d(right).astype(float)
    return Counts({"right": right, "of": np.ones_like(right) if of is None else np.atleast_2d(of).astype(float)})


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(right, of, low, high):
    """The last two: Newcombe (1998), table I."""
    found = statistics.wilson(right, of)
    assert found == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    values = np.arange(of) < right
    assert statistics.interval(counts(values), SHARE) == found


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for n in (1, 4, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = [any(i < c for i in drawn) for drawn in combinations(range(n), k)]
                assert statistics.pass_at(k, np.array([c]), n)[0] == pytest.approx(np.mean(draws))


def test_deviation_is_over_seeds_else_over_resamples():
    assert statistics.deviation(counts(np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])), SHARE) == 0.25
    one = np.arange(400) < 120
    assert statistics.deviation(counts(one), SHARE) == pytest.approx(np.sqrt(0.3 * 0.7 / 400), rel=0.1)
    assert statistics.deviation(counts(np.zeros(400)), SHARE) == 0
    assert statistics.by_seed(counts(np.array([[1, 0], [1, 1]])), SHARE) == [0.5, 1.0]


def test_bootstrap_intervals_of_ratios_hold_their_level():
    """Ratios of sums whose problems weigh differently: about 95 of 100 intervals hold the true value."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        of = rng.integers(1, 6, 150)
        low, high = statistics.interval(counts(rng.binomial(of, 0.3), of), SHARE)
        held += low <= 0.3 <= high
    assert 180 <= held <= 198


def test_responses_of_one_problem_are_resampled_together():
    """Four samples that are all right or all wrong say no more than one of each: the interval is as wide."""
    once, four = counts(np.arange(200) < 80), counts(4 * (np.arange(200) < 80), np.full(200, 4))
    one, all_four = statistics.interval(once, SHARE), statistics.interval(four, SHARE)
    assert np.diff(all_four)[0] == pytest.approx(np.diff(one)[0], rel=0.05)


def test_paired_differences_leave_out_what_both_have_in_common():
    rng = np.random.default_rng(2)
    original = rng.random(500) < 0.5
    student = original.copy()
    student[:10] = ~student[:10]
    mean, (low, high) = statistics.difference(counts(student), counts(original), SHARE)
    assert mean == pytest.approx(student.mean() - original.mean())
    changed = student.astype(float) - original
    expected = 1.96 * changed.std() / np.sqrt(500)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.15)
    apart = sum(np.diff(statistics.interval(counts(x), SHARE))[0] for x in (student, original)) / 2
    assert high - low < apart / 3
    same = statistics.difference(counts(original), counts(original), SHARE)
    assert same == (0, (0, 0))
    with pytest.raises(ValueError, match="500 problems cannot be paired with 3"):
        statistics.difference(counts(student), counts(np.ones(3)), SHARE)


def test_nothing_counted_is_no_number():
    empty = counts(np.zeros(4), np.zeros(4))
    assert statistics.by_seed(empty, SHARE) == [None]
    assert statistics.mean_of([None]) is None
    assert statistics.interval(empty, SHARE) is None
    assert statistics.deviation(empty, SHARE) is None
    assert statistics.difference(counts(np.ones(4)), empty, SHARE) is None
    # a problem that counts nothing is left out, not failed
    some = counts(np.array([1, 1, 0, 0]), np.array([1, 1, 0, 1]))
    assert statistics.by_seed(some, SHARE) == [pytest.approx(2 / 3)]
    assert statistics.interval(some, SHARE) == statistics.wilson(2, 3)
