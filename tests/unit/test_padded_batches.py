"""Batches by padded size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.padded_batches import padded_batches


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [(1, [[1], [3], [4], [0], [2]]), (40, [[1], [3, 4, 0], [2]]), (1000, [[1, 3, 4, 0, 2]])],
)
def test_longest_first(max_tokens, expected):
    assert list(padded_batches([5, 30, 4, 12, 9], max_tokens)) == expected


def test_equal_lengths_keep_their_order():
    assert list(padded_batches([3, 7, 3, 7, 3], 9)) == [[1], [3], [0, 2, 4]]
    assert list(padded_batches([], 9)) == []


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 100))
def test_every_sequence_is_in_one_batch_that_fits_or_alone(lengths, max_tokens):
    batches = list(padded_batches(lengths, max_tokens))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= max_tokens
