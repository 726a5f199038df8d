"""The run's metrics in its folder: JSON lines, and TensorBoard events of the same values."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from deploy.files import LineWriter, replace_text
from deploy.monitoring.metrics import METRICS
from deploy.monitoring.observer import Observer
from deploy.monitoring.pace import Pace

if TYPE_CHECKING:  # slow to import
    from torch.utils.tensorboard import SummaryWriter


class RunLog(Observer):
    """Appends to `metrics.jsonl` (one object per rollout batch) and to TensorBoard events in `tensorboard/`.

    Every object has all names of METRICS, in that order; an optional one that was not measured is null. What an earlier
    part of the run logged from batch `first` on is dropped from both: it is trained again.
    """

    def __init__(self, run_dir: Path, first: int = 0) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._events_dir = run_dir / "tensorboard"
        self._first = first
        self._events: SummaryWriter | None = None

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        cut_metrics(self._path, self._first)
        self._file = LineWriter(self._path)
        self._events = self._new_events(self._first or None)
        return self

    def batch(self, metrics: Mapping[str, Any], pace: Pace | None = None) -> None:
        """Log one rollout batch; optional metrics may be left out.

        Raises:
            KeyError: a metric is not in METRICS, or one that is not optional is missing.
            OSError: the disk takes no more; the rows wait for the next call, the events are left out.
        """
        metrics = {**metrics, "time": time.time()}
        required = {name for name, spec in METRICS.items() if not spec.optional}
        if wrong := (metrics.keys() - METRICS.keys()) | (required - metrics.keys()):
            raise KeyError(f"metrics differ from the registry: {sorted(wrong)}")
        self._file.append(json.dumps({name: metrics.get(name) for name in METRICS}))
        self._events = self._events or self._new_events()
        try:
            for name, value in metrics.items():
                if name not in ("batch", "time"):
                    self._events.add_scalar(name, value, int(metrics["batch"]))
            self._events.flush()
        except OSError:
            self._events = None  # its thread has ended
            raise

    def _new_events(self, purge_step: int | None = None) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._events_dir), purge_step=purge_step)

    def end(self, error: BaseException | None) -> None:
        with suppress(OSError):
            self._file.flush()
            if self._events:
                self._events.close()


def cut_metrics(path: Path, batches: int) -> None:
    """Keep the rows of the first `batches` rollout batches. A last line that a crash cut short goes too."""
    if path.is_file():
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1].splitlines(keepends=True)
        kept = "".join(line for line in whole if json.loads(line)["batch"] < batches)
        if kept != text:
            replace_text(path, kept)
