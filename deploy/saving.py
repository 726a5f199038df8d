"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path

import ray

from common.config.pipeline import PipelineConfig
from deploy.checkpoints import Checkpoints, RunState
from deploy.monitoring.observer import Observers


class Saving:
    """Writes one checkpoint at a time; one that fails is a warning, and the run goes on.

    Life cycle of a checkpoint: when one is `due`, `begin` gives the folder, the ranks take their copies and begin to
    write, `finish` leaves the rest to a thread, and `wait` waits for that:

        if saving.due(batches) and (partial := saving.begin(name, batches)):
            ...
            saving.finish(name, state, [rank.written.remote() for rank in ranks])
    """

    def __init__(self, config: PipelineConfig, checkpoints: Checkpoints, observers: Observers, batches: int) -> None:
        """`batches` of the run are done when this process begins."""
        self._config = config
        self._checkpoints = checkpoints
        self._observers = observers
        self._thread: threading.Thread | None = None
        self._begun = batches, time.monotonic()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def due(self, batches: int) -> bool:
        """Whether it is time for a checkpoint, by minutes or by batches; while one is written, the next waits."""
        before, begun = self._begun
        if self.busy or batches == before:
            return False
        every, seconds = self._config.checkpoint_every_batches, 60 * self._config.checkpoint_every_minutes
        by_count = every and batches // every > before // every
        return bool(by_count or (seconds and time.monotonic() - begun >= seconds))

    def begin(self, name: str, batches: int) -> Path | None:
        """An empty folder for all ranks to write in; None where it cannot be made."""
        self.wait()
        self._begun = batches, time.monotonic()
        try:
            return self._checkpoints.begin(name)
        except OSError as error:
            self._failed(name, error)
            return None

    def finish(self, name: str, state: RunState, calls: list[ray.ObjectRef]) -> None:
        """Finish the checkpoint once all ranks have written their files, which ends `calls`."""
        arguments = name, copy.deepcopy(state), calls, time.monotonic()
        self._thread = threading.Thread(target=self._finish, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> None:
        if self._thread:
            self._thread.join(timeout_s)

    def _finish(self, name: str, state: RunState, calls: list[ray.ObjectRef], begun: float) -> None:
        try:
            ray.get(calls, timeout=self._config.stage_timeout_s)
            folder, nbytes = self._checkpoints.finish(name, state)
        except Exception as error:  # a full disk has many forms, and none is worth the run
            self._checkpoints.abandon(name)
            self._failed(name, error)
            return
        seconds = time.monotonic() - begun
        self._observers.note(f"checkpoint {folder.name} is written: {nbytes / 2**20:,.1f} MiB in {seconds:.1f} s")
        self._checkpoints.copy_missing(self._observers)
        self._checkpoints.prune()

    def _failed(self, name: str, error: Exception) -> None:
        cause = getattr(error, "cause", None) or error
        said = str(cause).strip().splitlines()[-1] if str(cause).strip() else repr(cause)
        self._observers.note(
            f"checkpoint {name} could not be written to {str(self._checkpoints.folder)!r} ({said}); the run goes on "
            "and tries again when the next is due: free space there",
            "warning",
        )
