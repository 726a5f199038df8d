"""The block grid: blocks are counted from position 0 of the whole sequence, prompt included.

So a sequence of any length is filled up, or cut, to a multiple of the block size, not its response alone.
"""

from __future__ import annotations


def grid_ceil(length: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `length`: where the block ends in which a sequence ends."""
    return -(-length // step) * step


def grid_floor(length: int, step: int) -> int:
    """The largest multiple of `step` that is not above `length`: how much of it whole blocks fill."""
    return length // step * step
