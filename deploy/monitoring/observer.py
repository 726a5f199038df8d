"""The one way in which a run tells what it does: whoever watches it is an `Observer`.

    with Observers([RunLog(run_dir), RunStatus(run_dir, ...), Terminal(...)]) as observers:
        observers.note("loading models", state="starting")
        observers.heard("rollout-0", role="rollout", pid=4711)
        observers.active({"rollout-0": "generating"}, {"rollout": (3, 32)})
        observers.batch(metrics)

What was left out: a bus with subscriptions and threads. There are six observers, all known when the run starts, and
what is slow in one of them (the status file, Ray's gauges) is done by a thread of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, Self

from deploy.monitoring.health import Health
from deploy.monitoring.pace import Pace

Level = Literal["detail", "info", "warning", "error"]

_QUIET_SECONDS = 60.0  # a warning about the disk is not repeated sooner


@dataclass(frozen=True)
class Note:
    """Something worth saying. A `detail` is shown while it holds and kept nowhere."""

    text: str
    level: Level = "info"
    state: str | None = None  # what the run does from now on; none: as before


class Observer:
    """Watches one run. Each call says one thing; an observer leaves out the calls that do not concern it.

    Life cycle: entered once, before or while models load; any calls in any order; `end` once, when it is left.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.end(error)

    def note(self, note: Note) -> None:
        """Something happened."""

    def heard(self, actor: str, facts: Mapping[str, Any]) -> None:
        """An actor answered. `facts` may hold its role, node, pid, rate (tokens/s) and weights_version."""

    def active(self, working: Mapping[str, str], stages: Mapping[str, tuple[int, int]]) -> None:
        """What is under way: the work of each actor that has any, by its name; and per stage how many trajectories
        of how many are through, where that is known."""

    def batch(self, metrics: Mapping[str, Any], pace: Pace) -> None:
        """A rollout batch is trained on. `metrics` has the names of deploy/monitoring/metrics.py."""

    def end(self, error: BaseException | None) -> None:
        """The run is over; `error` is what ended it, if anything did."""


class Observers(Observer):
    """All observers of a run as one. Warnings that follow from the metrics reach all of them as notes.

    Any thread may call it; the observers hear one call at a time.
    """

    def __init__(self, observers: list[Observer] | None = None, batches: int = 0, done: int = 0) -> None:
        """`done` of the run's `batches` were trained on before, where it goes on from a checkpoint."""
        self._observers: list[Observer] = []
        self._waiting = observers or []
        self._stack = ExitStack()
        self._health = Health()
        self._pace = Pace(batches, done)
        self._lock = threading.RLock()
        self._quiet_until = 0.0

    def __enter__(self) -> Self:
        self._stack.__enter__()
        for observer in self._waiting:
            self.add(observer)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._stack.__exit__(kind, error, traceback)

    def add(self, observer: Observer) -> None:
        """Enter one more; it is left with the others."""
        self._observers.append(self._stack.enter_context(observer))

    def note(self, note: Note | str, level: Level = "info", state: str | None = None) -> None:
        said = Note(note, level, state) if isinstance(note, str) else note
        self._each(lambda observer: observer.note(said))

    def heard(self, actor: str, facts: Mapping[str, Any] | None = None, **more: Any) -> None:
        facts = {**(facts or {}), **more, "last_heard": time.time()}
        self._each(lambda observer: observer.heard(actor, facts))

    def active(self, working: Mapping[str, str], stages: Mapping[str, tuple[int, int]] | None = None) -> None:
        self._each(lambda observer: observer.active(working, stages or {}))

    def training(self) -> None:
        """The first rollout batch of this process begins: the expected end counts from here."""
        self._pace.start()

    def batch(self, metrics: Mapping[str, Any], pace: Pace | None = None) -> None:
        self._pace.batch_done(int(metrics["batch"]) + 1)
        self._each(lambda observer: observer.batch(metrics, self._pace))
        for warning in self._health.warnings(metrics):
            self.note(warning, "warning")

    def _each(self, tell: Callable[[Observer], None]) -> None:
        """What an observer cannot write, to a full disk or a lost network, does not end the run."""
        with self._lock:
            for observer in self._observers:
                try:
                    tell(observer)
                except OSError as error:
                    self._warn(error)

    def _warn(self, error: OSError) -> None:
        if time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + _QUIET_SECONDS
            self.note(f"the run's records cannot be written ({error}); the run goes on, and tries again", "warning")
