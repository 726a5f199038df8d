"""SIGTERM (`ray job stop`), Ctrl-C, or a spent budget: the run ends after the batch at hand, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from deploy.errors import RunError, Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequested(Exception):  # noqa: N818 (no error: the run ends as it was asked to)
    """Leaves what is under way when the run was asked to stop."""


class StopSignals:
    """Notes the first signal; a second Ctrl-C interrupts at once.

    Must be entered after `ray.init`, which sets handlers of its own.
    """

    def __init__(self) -> None:
        self.received = 0
        self.failure: RunError | None = None

    @property
    def requested(self) -> bool:
        return self.received != 0 or self.failure is not None

    def fail(self, error: RunError) -> None:
        """Ask the run to stop because of an error; the first one counts."""
        self.failure = self.failure or error

    def check(self) -> None:
        """Raises:
        StopRequested: a signal has come, or an error that the run cannot go on with.
        """
        if self.requested:
            raise StopRequested

    def error(self, message: str) -> RunError:
        """What the run ends with; `message` says what is saved."""
        if self.failure:
            return RunError(f"{self.failure}; {message}")
        return Stopped(message, 128 + self.received)

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
