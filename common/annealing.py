"""Values that go from one to another over the first rollout batches."""

from __future__ import annotations

import math


def annealed(schedule: str, start: float, end: float, batches: int, batch: int) -> float:
    """The value in rollout batch `batch` (from 0): from start to end with p = min(1, batch / batches).

    `constant`: start; `linear`: with p; `cosine`: with (1 - cos(pi p)) / 2, slow at both ends.
    """
    p = min(1.0, batch / batches)
    progress = {"constant": 0.0, "linear": p, "cosine": (1 - math.cos(math.pi * p)) / 2}[schedule]
    return start + progress * (end - start)
