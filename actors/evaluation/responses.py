"""What a model answers: one response to each request, with the counts that speed is computed from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.sampler.request import Request
from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding
from actors.sampler.stop_strings import before_stop
from common.end_tokens import response_text
from common.trajectory import EndTokens


@dataclass(frozen=True)
class Response:
    """`ids` int32 [tokens], up to and with what ended the response; `text` is what stands before that.

    `finish_reason` is that of a trajectory: `eos`, `stop` or `length`.
    """

    ordinal: int
    sample: int
    ids: np.ndarray
    text: str
    denoise_forwards: int
    commit_forwards: int
    finish_reason: str

    @property
    def ended(self) -> bool:
        """By itself, before the limit."""
        return self.finish_reason != "length"


def responses(
    sampler: Sampler, tokenizer: PreTrainedTokenizerBase, requests: Iterable[Request], decoding: Decoding
) -> Iterator[Response]:
    """The responses of the sampler's current weights, as they end."""
    requests = list(requests)
    stops = {(r.ordinal, r.sample): r.stop for r in requests}
    for t in sampler.generate(requests, decoding):
        text = said(tokenizer, t.response_ids, sampler.eos_token_id, stops[t.ordinal, t.sample])
        yield Response(
            t.ordinal, t.sample, t.response_ids, text, t.denoise_forwards, t.commit_forwards, t.finish_reason
        )


def said(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, ends: EndTokens, stop: tuple[str, ...]) -> str:
    """The text before the end token or the first stop string."""
    return before_stop(response_text(tokenizer, ids, ends), stop)
