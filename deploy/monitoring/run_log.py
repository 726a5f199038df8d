"""The run's metrics in its folder: JSON lines, and TensorBoard events of the same values."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

from deploy.files import replace_text
from deploy.monitoring.metrics import METRICS
from deploy.monitoring.observer import Observer
from deploy.monitoring.pace import Pace


class RunLog(Observer):
    """Appends to `metrics.jsonl` (one object per rollout batch) and to TensorBoard events in `tensorboard/`.

    Every object has all names of METRICS, in that order; an optional one that was not measured is null. What an earlier
    part of the run logged from batch `first` on is dropped from both: it is trained again.
    """

    def __init__(self, run_dir: Path, first: int = 0) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._events_dir = run_dir / "tensorboard"
        self._first = first

    def __enter__(self) -> Self:
        from torch.utils.tensorboard import SummaryWriter

        self._path.parent.mkdir(parents=True, exist_ok=True)
        cut_metrics(self._path, self._first)
        self._file: IO[str] = self._path.open("a")
        self._events = SummaryWriter(str(self._events_dir), purge_step=self._first or None)
        return self

    def batch(self, metrics: Mapping[str, Any], pace: Pace | None = None) -> None:
        """Log one rollout batch; optional metrics may be left out.

        Raises:
            KeyError: a metric is not in METRICS, or one that is not optional is missing.
        """
        metrics = {**metrics, "time": time.time()}
        required = {name for name, spec in METRICS.items() if not spec.optional}
        if wrong := (metrics.keys() - METRICS.keys()) | (required - metrics.keys()):
            raise KeyError(f"metrics differ from the registry: {sorted(wrong)}")
        self._file.write(json.dumps({name: metrics.get(name) for name in METRICS}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if name not in ("batch", "time"):
                self._events.add_scalar(name, value, int(metrics["batch"]))
        self._events.flush()

    def end(self, error: BaseException | None) -> None:
        self._file.close()
        self._events.close()


def cut_metrics(path: Path, batches: int) -> None:
    """Keep the rows of the first `batches` rollout batches. A last line that a crash cut short goes too."""
    if path.is_file():
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1].splitlines(keepends=True)
        kept = "".join(line for line in whole if json.loads(line)["batch"] < batches)
        if kept != text:
            replace_text(path, kept)
