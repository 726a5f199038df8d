"""`trajectories.jsonl`: a few rollouts of the run for the trajectory viewer, one JSON object a line, bounded in size.

The newest are all kept; of the older ones a thinning selection, so that early and late rollouts can be compared. The
fields of an object are those of learner/rollout_samples.py, and `batch`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deploy.files import replace_text
from deploy.monitoring.observer import Observer
from deploy.monitoring.pace import Pace

RECENT, OLDER = 16, 16
_WRITE_SECONDS = 2.0


class RolloutLog(Observer):
    """Keeps RECENT + OLDER rollouts; they are asked for, and the file is replaced, at most every two seconds."""

    def __init__(self, run_dir: Path, batches: int, samples: Callable[[], list[dict[str, Any]]]) -> None:
        """`batches`: those that a resumed run has done; later ones in the file are dropped. `samples` gives a few
        rollouts of the batch that was trained on last."""
        self._samples = samples
        self._path = run_dir / "trajectories.jsonl"
        self._lines: list[tuple[int, str]] = []  # (batch, JSON)
        self._written = 0.0
        if self._path.is_file():
            text = self._path.read_text()
            lines = [(int(json.loads(line)["batch"]), line) for line in text[: text.rfind("\n") + 1].splitlines()]
            self._lines = [(batch, line) for batch, line in lines if batch < batches]

    def batch(self, metrics: Mapping[str, Any], pace: Pace | None = None) -> None:
        if time.monotonic() - self._written >= _WRITE_SECONDS:
            self._add(int(metrics["batch"]), self._samples())

    def _add(self, batch: int, rollouts: list[dict[str, Any]]) -> None:
        self._lines += [(batch, json.dumps({"batch": batch, **rollout})) for rollout in rollouts]
        while len(self._lines) > RECENT + OLDER:
            del self._lines[self._crowded()]
        replace_text(self._path, "".join(f"{line}\n" for _, line in self._lines), sync=False)
        self._written = time.monotonic()

    def _crowded(self) -> int:
        """Index of the older rollout whose neighbours are closest to each other; never the first."""
        older = [batch for batch, _ in self._lines[: len(self._lines) - RECENT + 1]]
        return min(range(1, len(older) - 1), key=lambda i: older[i + 1] - older[i - 1])
