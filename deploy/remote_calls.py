"""Remote waits with a deadline: past it, the run says which actor is stuck and on what."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

import ray

from deploy.errors import StuckError, WorkerError
from deploy.monitoring.observer import Observers
from deploy.stop_signals import StopSignals

_POLL_SECONDS = 0.2


class Background(Protocol):
    """Work that goes on while something else is waited for."""

    @property
    def waiting(self) -> list[Any]:
        """What `ray.wait` may wait for."""

    @property
    def working(self) -> Mapping[str, str]:
        """What each actor does that has any of this work, by its name."""

    def advance(self) -> None:
        """Handle all that is ready now, without waiting."""


class RemoteCalls:
    """Waits for calls to actors, and tells the observers who works and who has answered.

    `timeout_s` is how long nothing may arrive. A wait with `until_stop` ends when the run is asked to stop.
    """

    def __init__(self, timeout_s: float, observers: Observers | None = None, stop: StopSignals | None = None) -> None:
        self.timeout_s = timeout_s
        self.observers = observers or Observers()
        self.stop = stop or StopSignals()

    def wait(
        self,
        pending: dict[ray.ObjectRef, str],
        action: str,
        *,
        timeout_s: float | None = None,
        background: Background | None = None,
        until_stop: bool = False,
        shown: bool = True,
    ) -> list[Any]:
        """Results of the calls in the order of `pending`, whose values name the actors; `background` goes on meanwhile.

        The actors are shown at `action`, unless the call is no work worth showing.

        Raises:
            StuckError: the deadline passed; names the actors that did not answer.
            WorkerError: a call failed or its actor died; names the actor.
            StopRequested: the run was asked to stop, and the wait is `until_stop`.
        """
        timeout_s = timeout_s or self.timeout_s
        if shown:
            others = background.working if background else {}
            self.observers.active({**others, **dict.fromkeys(pending.values(), action)})
        waited = 0.0
        open_refs = list(pending)
        while open_refs:
            if until_stop:
                self.stop.check()
            start = time.perf_counter()
            if watched := background.waiting if background else []:
                ray.wait([*open_refs, *watched], num_returns=1, timeout=_POLL_SECONDS)
            ready, open_refs = ray.wait(open_refs, num_returns=len(open_refs), timeout=0 if watched else _POLL_SECONDS)
            for ref in ready:
                self.result(ref, pending[ref], action)
            if background:
                background.advance()
            waited = 0.0 if ready else waited + time.perf_counter() - start
            if open_refs and waited >= timeout_s:
                names = ", ".join(sorted({pending[ref] for ref in open_refs}))
                raise StuckError(f"{action}: no answer from {names} within {timeout_s:.0f} s")
        return [ray.get(ref) for ref in pending]

    def result(self, ref: ray.ObjectRef, name: str, action: str) -> Any:
        """The result of a finished call.

        Raises:
            WorkerError: it failed; the message holds the cause.
        """
        try:
            result = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            raise WorkerError(f"{name} failed while {action}: {error.cause!r}\n{error}") from error
        except ray.exceptions.RayError as error:
            raise WorkerError(f"{name} died while {action}: {error}") from error
        self.observers.heard(name)
        return result
