"""Remote waits with a deadline: past it, the run says which actor is stuck and on what.

A call that can be asked `again` outlives its actor: it is asked of the replacement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import ray

from deploy.errors import StuckError, WorkerError
from deploy.monitoring.observer import Observers
from deploy.stop_signals import StopSignals

CREATION = "error raised in its creation task"  # Ray's words for an exception in an actor's constructor
_POLL_SECONDS = 0.2

Again = Callable[[str], ray.ObjectRef]  # asks the actor that now has a name once more


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


class Repair:
    """What becomes of actors that fail. Here nobody replaces them; deploy/recovery.py does."""

    def watch(self, pools: Any) -> None:
        """These are the actors from now on."""

    def look(self, working: Mapping[str, str]) -> None:
        """Replace actors that hang; called from every wait. `working`: what is waited for, by the actors' names."""

    def failed(self, name: str, ref: ray.ObjectRef, error: WorkerError) -> None:
        """Replace the actor whose call failed, unless that was done.

        Raises:
            WorkerError: it is not replaced.
        """
        raise error

    def answered(self, name: str) -> None:
        """A call gave its result."""


class RemoteCalls:
    """Waits for calls to actors, and tells the observers who works and who has answered.

    `timeout_s` is how long nothing may arrive. A wait with `until_stop` ends when the run is asked to stop.
    """

    def __init__(
        self,
        timeout_s: float,
        observers: Observers | None = None,
        stop: StopSignals | None = None,
        repair: Repair | None = None,
    ) -> None:
        self.timeout_s = timeout_s
        self.observers = observers or Observers()
        self.stop = stop or StopSignals()
        self.repair = repair or Repair()

    def wait(
        self,
        pending: dict[ray.ObjectRef, str],
        action: str,
        *,
        timeout_s: float | None = None,
        background: Background | None = None,
        until_stop: bool = False,
        shown: bool = True,
        again: Again | None = None,
        together: bool = False,
    ) -> list[Any]:
        """Results of the calls in the order of `pending`, whose values name the actors; `background` goes on meanwhile.

        The actors are shown at `action`, unless the call is no work worth showing. Calls that belong `together` are
        all asked again when one fails.

        Raises:
            StuckError: the deadline passed; names the actors that did not answer.
            WorkerError: a call failed or its actor died, and cannot be asked `again`; names the actor.
            StopRequested: the run was asked to stop, and the wait is `until_stop`; or it cannot go on, and these are
                no calls of the learner, which must be in a known state when the last checkpoint is written.
        """
        timeout_s = timeout_s or self.timeout_s
        calls = list(pending.items())
        open_places = {ref: place for place, (ref, _) in enumerate(calls)}
        if shown:
            self.observers.active(self._working(calls, open_places, action, background))
        waited = 0.0
        while open_places:
            if until_stop or (self.stop.failure and not together):
                self.stop.check()
            self.repair.look(self._working(calls, open_places, action, background))
            start = time.perf_counter()
            if watched := background.waiting if background else []:
                ray.wait([*open_places, *watched], num_returns=1, timeout=_POLL_SECONDS)
            ready, _ = ray.wait(
                list(open_places), num_returns=len(open_places), timeout=0 if watched else _POLL_SECONDS
            )
            for ref in ready:
                if ref not in open_places:  # asked again meanwhile
                    continue
                place = open_places.pop(ref)
                name = calls[place][1]
                try:
                    self.result(ref, name, action)
                except WorkerError as error:
                    if again is None:
                        raise
                    self.repair.failed(name, ref, error)
                    for other in range(len(calls)) if together else [place]:
                        open_places.pop(calls[other][0], None)
                        calls[other] = again(calls[other][1]), calls[other][1]
                        open_places[calls[other][0]] = other
            if background:
                background.advance()
            waited = 0.0 if ready else waited + time.perf_counter() - start
            if open_places and waited >= timeout_s:
                names = ", ".join(sorted({calls[place][1] for place in open_places.values()}))
                raise StuckError(f"{action}: no answer from {names} within {timeout_s:.0f} s")
        return [ray.get(ref) for ref, _ in calls]

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
        self.repair.answered(name)
        return result

    def _working(
        self,
        calls: list[tuple[ray.ObjectRef, str]],
        open_places: Mapping[ray.ObjectRef, int],
        action: str,
        background: Background | None,
    ) -> dict[str, str]:
        others = background.working if background else {}
        return {**others, **dict.fromkeys((calls[place][1] for place in open_places.values()), action)}


def is_failed(ref: ray.ObjectRef) -> bool:
    """Whether a call that is over ended in an error."""
    try:
        ray.get(ref)
    except ray.exceptions.RayError:
        return True
    return False
