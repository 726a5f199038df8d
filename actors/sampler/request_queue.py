"""Requests that wait for a slot."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from actors.sampler.request import Request

# further requests that have come, where the argument is true after waiting for some; None: no more will come
More = Callable[[bool], list[Request] | None]


@dataclass
class RequestQueue:
    """Requests that wait for a slot; `more` tells of those that come later, until it says that there are no more."""

    requests: deque[Request]
    more: More | None

    def __bool__(self) -> bool:
        return bool(self.requests or self.more)

    def receive(self, idle: bool) -> None:
        """Take in what has come; where nothing else is to be done, wait for it."""
        if self.more:
            came = self.more(idle and not self.requests)
            self.requests.extend(came or ())
            self.more = None if came is None else self.more
