"""When an actor computed: spans of Unix time, from which the pipeline derives how long nobody did.

Spans of different nodes are compared as they are. Clocks that differ by x move the metrics of a batch by at most x per
hand-over; nodes that keep time by NTP agree to milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

Span = tuple[float, float]
_Method = TypeVar("_Method", bound=Callable[..., Any])


class BusySpans:
    """The (begin, end) spans since they were last taken."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    def add(self, seconds: float) -> None:
        """A span of so many seconds, which ends now."""
        now = time.time()
        self._spans.append((now - seconds, now))

    def take(self) -> list[Span]:
        spans, self._spans = self._spans, []
        return spans


def computes(method: _Method) -> _Method:
    """Add the time of each call of a method to its object's `spans`."""

    @wraps(method)
    def timed(self: Any, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(self, *arguments, **options)
        finally:
            self.spans.add(time.perf_counter() - start)

    return timed  # type: ignore[return-value]
