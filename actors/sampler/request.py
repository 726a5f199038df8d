"""What the sampler is asked to generate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actors.sampler.sampling import Decoding


@dataclass(frozen=True)
class Request:
    """One sequence to generate.

    (ordinal, sample) is its key: it seeds the sampling and names the trajectory. The response has at most
    `max_new_tokens` tokens. Blocks are decoded whole all the same: what the last one has behind the limit becomes the
    trajectory's tail. So does what it has behind the token that completes the first of the `stop` strings.

    `decoding` stands in for that of the call, `key` for the one of the random stream that the sampler's seed, the
    ordinal and the sample make (common/seeds.py).
    """

    ordinal: int
    sample: int
    prompt_ids: np.ndarray  # int [n]
    max_new_tokens: int  # at least 1
    domain: str = ""
    stop: tuple[str, ...] = ()
    decoding: Decoding | None = None
    key: int | None = None  # int64
