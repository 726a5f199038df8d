"""When an actor computed: spans of Unix time, from which the pipeline derives how long nobody did.

Spans of different nodes are compared as they are. Clocks that differ by x move the metrics of a batch by at most x per
hand-over; nodes that keep time by NTP agree to milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

Span = tuple[float, float]
_Method = TypeVar("_Method", bound=Callable[..., Any])


class BusySpans:
    """The (begin, end) spans since they were last taken."""

    def __init__(
        self, now: Callable[[], float] = time.time, stopwatch: Callable[[], float] = time.perf_counter
    ) -> None:
        """`now` says where a span ends; `stopwatch` measures its length, and never jumps as `now` may."""
        self._now = now
        self._stopwatch = stopwatch
        self._spans: list[Span] = []

    def add(self, seconds: float) -> None:
        """A span of so many seconds, which ends now."""
        now = self._now()
        self._spans.append((now - seconds, now))

    @contextmanager
    def measure(self) -> Iterator[None]:
        """The body of a `with` statement as a span, even if it raises."""
        start = self._stopwatch()
        try:
            yield
        finally:
            self.add(self._stopwatch() - start)

    def take(self) -> list[Span]:
        spans, self._spans = self._spans, []
        return spans


def computes(method: _Method) -> _Method:
    """Add the time of each call of a method to its object's `spans`."""

    @wraps(method)
    def timed(self: Any, *arguments: Any, **options: Any) -> Any:
        with self.spans.measure():
            return method(self, *arguments, **options)

    return timed  # type: ignore[return-value]
