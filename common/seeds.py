"""Random numbers that depend only on what they are for.

A trajectory is keyed by (run seed, ordinal, sample); the uniform number for one of its positions in one round is a
hash of that key, the position and the round. So a trajectory does not depend on the actor, the slot or the batch
in which it was made, up to floating-point rounding of the model.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def stream_key(run_seed: int, ordinal: int, sample: int) -> int:
    """int64 key of one trajectory's random stream."""
    state = np.random.SeedSequence([run_seed, ordinal, sample]).generate_state(1, np.uint64)
    return int(state.view(np.int64)[0])


def state_rng(run_seed: int, ordinal: int, sample: int) -> np.random.Generator:
    """The generator of one trajectory's state selection, independent of its decoding stream."""
    return np.random.default_rng([run_seed, ordinal, sample, 1])


def source_rng(run_seed: int, ordinal: int) -> np.random.Generator:
    """The generator that chooses whether a prompt takes an offline response, and which."""
    return np.random.default_rng([run_seed, ordinal, 0, 2])


def routing_rng(ordinal: int, sample: int) -> np.random.Generator:
    """The generator that chooses the positions of one trajectory that get a block-aware target."""
    return np.random.default_rng([0, ordinal, sample, 3])


def uniform(keys: Tensor, positions: Tensor, rounds: Tensor) -> Tensor:
    """Uniform float32 in (0, 1) for broadcastable int64 keys, positions and rounds (SplitMix64, two steps)."""
    mixed = _splitmix64(_splitmix64(keys + positions * _GOLDEN) + (rounds + 1) * _MIX1)
    bits = _shift_right(mixed, 40)  # 24 random bits
    return (bits.to(torch.float32) + 0.5) * 2.0**-24


def _splitmix64(z: Tensor) -> Tensor:
    z = z + _GOLDEN
    z = (z ^ _shift_right(z, 30)) * _MIX1
    z = (z ^ _shift_right(z, 27)) * _MIX2
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64, whose own shift is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
