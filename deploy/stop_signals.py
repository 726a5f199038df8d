"""SIGTERM (`ray job stop`) and Ctrl-C: the run ends after the batch at hand, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from deploy.errors import Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Notes the first signal; a second Ctrl-C interrupts at once.

    Must be entered after `ray.init`, which sets handlers of its own.
    """

    def __init__(self) -> None:
        self.received = 0

    @property
    def requested(self) -> bool:
        return self.received != 0

    def error(self, message: str) -> Stopped:
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
