"""Response length limit over the run: short responses first, since early students wander."""

from __future__ import annotations

import math

from common.config import CurriculumConfig


def response_limit(config: CurriculumConfig, batch: int, block_size: int) -> int:
    """Longest response, in tokens, of rollout batch `batch` (from 0); a multiple of `block_size`.

    With p = min(1, batch / batches): `linear` grows with p, `cos` with 1 - cos(pi p / 2), from min_tokens to
    max_tokens (section 7 of the method's specification).
    """
    p = min(1.0, batch / config.batches)
    share = {"constant": 1.0, "linear": p, "cos": 1 - math.cos(math.pi * p / 2)}[config.schedule]
    tokens = config.min_tokens + share * (config.max_tokens - config.min_tokens)
    return max(block_size, int(tokens + 1e-9) // block_size * block_size)
