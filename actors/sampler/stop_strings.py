"""Stop strings: a response ends with the token that completes the first of them, and says what stands before it.

They are looked for in the decoded text, since a string can be written with many sequences of tokens, and can begin or
end within one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np

_MARGIN = 4  # tokens: decoders may strip a space from the first one, and a character may have up to four bytes


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings, or all of it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


class StopStrings:
    """Finds stop strings in token ids; special tokens are not part of the text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def completed(self, ids: np.ndarray, stops: Sequence[str]) -> int:
        """How many of the ids, int [n], there are up to and with the one that completes the first stop string; 0: none
        is in the text."""
        if not self.found(ids, stops):
            return 0
        return bisect_left(range(1, len(ids) + 1), True, key=lambda count: self.found(ids[:count], stops)) + 1

    def found(self, ids: np.ndarray, stops: Sequence[str]) -> bool:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return any(stop in text for stop in stops)


def reach(stops: Sequence[str], new_tokens: int) -> int:
    """How many of the last tokens hold any stop string that one of the `new_tokens` newest completes: a token writes at
    least one byte. (Among special tokens one may reach further back; it is found when the response ends.)"""
    return max(len(stop.encode()) for stop in stops) + new_tokens + _MARGIN
