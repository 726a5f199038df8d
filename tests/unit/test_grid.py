"""Lengths on the block grid."""

from common.grid import grid_ceil, grid_floor


def test_both_neighbours_of_a_length():
    assert [(grid_floor(n, 4), grid_ceil(n, 4)) for n in (0, 1, 4, 7, 8)] == [(0, 0), (0, 4), (4, 4), (4, 8), (8, 8)]
    assert [(grid_floor(n, 1), grid_ceil(n, 1)) for n in (0, 3)] == [(0, 0), (3, 3)]
