"""`trajectories.jsonl`: a few rollouts of the run for the trajectory viewer, one JSON object a line, bounded in size.

The newest are all kept; of the older ones a thinning selection, so that early and late rollouts can be compared. The
fields of an object are those of learner/rollout_samples.py, and `batch`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from deploy.monitoring.status import replace_text

RECENT, OLDER = 16, 16
_WRITE_SECONDS = 2.0


class RolloutLog:
    """Keeps RECENT + OLDER rollouts; the file is replaced at most every two seconds."""

    def __init__(self, run_dir: Path, batches: int) -> None:
        """`batches`: those that a resumed run has done; later ones in the file are dropped."""
        self._path = run_dir / "trajectories.jsonl"
        self._lines: list[tuple[int, str]] = []  # (batch, JSON)
        self._written = 0.0
        if self._path.is_file():
            lines = [(int(json.loads(line)["batch"]), line) for line in self._path.read_text().splitlines()]
            self._lines = [(batch, line) for batch, line in lines if batch < batches]

    @property
    def due(self) -> bool:
        return time.monotonic() - self._written >= _WRITE_SECONDS

    def add(self, batch: int, rollouts: list[dict[str, Any]]) -> None:
        self._lines += [(batch, json.dumps({"batch": batch, **rollout})) for rollout in rollouts]
        while len(self._lines) > RECENT + OLDER:
            del self._lines[self._crowded()]
        replace_text(self._path, "".join(f"{line}\n" for _, line in self._lines))
        self._written = time.monotonic()

    def _crowded(self) -> int:
        """Index of the older rollout whose neighbours are closest to each other; never the first."""
        older = [batch for batch, _ in self._lines[: len(self._lines) - RECENT + 1]]
        return min(range(1, len(older) - 1), key=lambda i: older[i + 1] - older[i - 1])
