"""Batches of sequences that are padded to the longest one of their batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def padded_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices of sequences, the longest first, in batches of at most `max_tokens` tokens, padding included.

    A batch's first sequence is its longest and sets its width. A sequence longer than `max_tokens` is alone. Sequences
    of equal length stay in their order.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
