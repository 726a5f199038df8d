"""Remote waits with a deadline: past it, the run says which actor is stuck and on what."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray

from deploy.errors import StuckError, WorkerError

_POLL_SECONDS = 0.2

last_heard: dict[str, float] = {}  # Unix time of every actor's last answer, by its name


def wait_all(
    pending: dict[ray.ObjectRef, str],
    action: str,
    timeout_s: float,
    idle: Callable[[], Any] | None = None,
    others: Callable[[], list[Any]] = list,
) -> list[Any]:
    """Results of the calls in the order of `pending`, whose values name the actors.

    `idle` is called meanwhile: about five times a second, and whenever one of `others()` is ready, which it handles.

    Raises:
        StuckError: the deadline passed; names the actors that did not answer.
        WorkerError: a call failed or its actor died; names the actor.
    """
    waited = 0.0
    open_refs = list(pending)
    while open_refs:
        start = time.perf_counter()
        if watched := others():
            ray.wait([*open_refs, *watched], num_returns=1, timeout=_POLL_SECONDS)
        ready, open_refs = ray.wait(open_refs, num_returns=len(open_refs), timeout=0 if watched else _POLL_SECONDS)
        for ref in ready:
            result_of(ref, pending[ref], action)
        if idle:
            idle()
        waited = 0.0 if ready else waited + time.perf_counter() - start
        if open_refs and waited >= timeout_s:
            names = ", ".join(sorted({pending[ref] for ref in open_refs}))
            raise StuckError(f"{action}: no answer from {names} within {timeout_s:.0f} s")
    return [ray.get(ref) for ref in pending]


def result_of(ref: ray.ObjectRef, name: str, action: str) -> Any:
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
    last_heard[name] = time.time()
    return result
