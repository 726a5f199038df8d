"""Hypothesis strategies for trajectories as a sampler could have made them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from common.trajectory import Trajectory

EOS = 1


@st.composite
def trajectory(draw, block_size: int = 4, ordinal: int = 0) -> Trajectory:
    """Any prompt length, reveal rounds without gaps in every block, end token possibly inside the last block."""
    prompt = draw(st.integers(1, 11))
    blocks = draw(st.integers(1, 4))
    end = (prompt // block_size + blocks) * block_size
    written = end - prompt
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rounds = np.empty(written, np.int16)
    grid = np.arange(prompt, end) // block_size
    for b in np.unique(grid):
        members = np.flatnonzero(grid == b)
        steps = rng.integers(1, len(members) + 1)
        values = np.concatenate([np.arange(steps), rng.integers(0, steps, len(members) - steps)])
        rounds[members] = rng.permutation(values)
    last = int((grid == grid[-1]).sum())
    tail = draw(st.integers(0, last - 1))
    ids = rng.integers(2, 50, written).astype(np.int32)
    if tail:
        ids[written - tail - 1] = EOS
    return Trajectory(
        ordinal=ordinal,
        sample=0,
        domain=draw(st.sampled_from(["", "math"])),
        prompt_ids=rng.integers(2, 50, prompt).astype(np.int32),
        response_ids=ids[: written - tail],
        tail_ids=ids[written - tail :],
        reveal_round=rounds,
        confidence=rng.random(written).astype(np.float32),
        weights_version=3,
        finish_reason="eos" if tail else "length",
        denoise_forwards=5,
        commit_forwards=blocks - 1,
    )
