"""When the run will end: one estimate for the terminal, the status file and the page."""

from __future__ import annotations

import time
from collections import deque

_RECENT_BATCHES = 20


class Pace:
    """Mean seconds of the last twenty rollout batches. The first batch of a process compiles, so it counts only until
    a second one is through."""

    def __init__(self, batches: int, done: int = 0) -> None:
        """`done` of `batches` were trained on before this process began."""
        self.batches = batches
        self.done = done
        self._times: deque[float] = deque(maxlen=_RECENT_BATCHES + 1)  # when each batch was through
        self._started = time.time()

    def start(self) -> None:
        """The first rollout batch begins."""
        self._started = time.time()

    def batch_done(self, done: int) -> None:
        """`done` rollout batches are trained on now."""
        self.done = done
        self._times.append(time.time())

    @property
    def seconds_per_batch(self) -> float | None:
        """None before the first batch is through."""
        if len(self._times) > 1:
            return (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        return self._times[0] - self._started if self._times else None

    @property
    def seconds_left(self) -> float | None:
        """From the end of the last batch to the end of training."""
        per_batch = self.seconds_per_batch
        return None if per_batch is None else per_batch * (self.batches - self.done)

    @property
    def expected_end(self) -> float | None:
        """Unix time."""
        left = self.seconds_left
        return None if left is None else self._times[-1] + left
