"""What the sampler is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Request:
    """One sequence to generate.

    The response runs to the end of the block in which it reaches `max_new_tokens`: up to B - 1 tokens more.
    """

    ordinal: int
    sample: int
    prompt_ids: np.ndarray
    max_new_tokens: int
    domain: str = ""
