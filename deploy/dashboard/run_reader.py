"""Reads the folder of a run that is running, finished or copied; of each file only what is new."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from common.config.errors import ConfigError
from common.config.renamed import RUN_FILES
from deploy.dashboard.decimation import min_max, moving_average
from deploy.dashboard.line_file import LineFile
from deploy.monitoring.metrics import METRICS
from deploy.roles import ROLES, STAGES

_RECENT_BATCHES = 10  # shares and bottleneck are means over these
_OLD_SECONDS = 15.0  # status.json is written every second
_FIRST_BATCH_SECONDS = 120.0  # assumed until two batches have shown how long one takes
_EVENTS = 50
SMOOTH = "~"


class RunReader:
    """`refresh` looks for changes; everything else answers from memory."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.columns: dict[str, list[float]] = {name: [] for name in METRICS}
        self.status: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self.rollouts: list[dict[str, Any]] = []
        self._metrics = LineFile(run_dir / "metrics.jsonl")
        self._events = LineFile(run_dir / "events.jsonl")
        self._trajectories = LineFile(run_dir / "trajectories.jsonl")

    @property
    def batches(self) -> int:
        return len(self.columns["batch"])

    @property
    def rollouts_version(self) -> int:
        return self._trajectories.modified_ns

    def refresh(self) -> None:
        """Read what was written since the last call."""
        self._read_metrics()
        status = self.run_dir / "status.json"
        if status.is_file():
            self.status = json.loads(status.read_bytes())
        anew, lines = self._events.read()
        self.events = [*([] if anew else self.events), *map(json.loads, lines)][-_EVENTS:]
        anew, lines = self._trajectories.read()
        self.rollouts = [*([] if anew else self.rollouts), *(_named(json.loads(line)) for line in lines)]

    def snapshot(self) -> dict[str, Any]:
        """What the page shows beside charts and rollouts; JSON without NaN."""
        now = time.time()
        return {
            "now": now,
            "run": self.status,
            "health": health(self.status, self.events, now),
            "batches": self.batches,
            "rollouts_version": self.rollouts_version,
            "latest": {name: _number(values[-1]) for name, values in self.columns.items() if values},
            "shares": self.shares(),
            "events": self.events,
        }

    def shares(self) -> dict[str, Any]:
        """Mean busy, waiting and blocked share per role over the last batches, and the stage that takes longest.

        A role without processes has none. The bottleneck is the stage whose busiest actor is busy for the largest part
        of the wall time.
        """
        if not self.batches:
            return {}
        recent = {name: values[-_RECENT_BATCHES:] for name, values in self.columns.items()}
        shares = {
            role: {kind: _number(float(np.mean(recent[f"{kind}/{role}"]))) for kind in ("busy", "waiting", "blocked")}
            for role in ROLES
            if not np.isnan(recent[f"busy/{role}"]).all()
        }
        wall = max(sum(recent["seconds/batch"]), 1e-9)
        parts = {stage: sum(recent[f"seconds/{stage}"]) / wall for stage in STAGES}
        slowest = max(STAGES, key=lambda stage: parts[stage])
        return {"roles": shares, "bottleneck": slowest, "bottleneck_share": _number(min(parts[slowest], 1.0))}

    def series(
        self, x_metric: str, names: list[str], points: int, begin: float = -math.inf, end: float = math.inf
    ) -> dict[str, dict[str, list[float | None]]]:
        """Each metric against another as at most `points` points between two values of x; metrics without data are
        left out. A name that ends in SMOOTH asks for the moving average. `x_metric` may be `hours`, those since the
        first batch was logged."""
        if not self.batches:
            return {}
        x = self._x(x_metric)
        first, last = np.searchsorted(x, begin), np.searchsorted(x, end, side="right")
        # one more on either side, so that the line runs to the edge
        window = slice(max(int(first) - 1, 0), int(last) + 1)
        result = {}
        for name in names:
            y = np.asarray(self.columns[name.removesuffix(SMOOTH)], dtype=np.float64)
            if name.endswith(SMOOTH):
                y = moving_average(y, max(5, len(y) // 40))
            y = y[window]
            # metrics of evaluations stand only in the batches that were evaluated
            known = ~np.isnan(y) if name.startswith("eval") else np.ones(len(y), dtype=bool)
            if known.any():
                xs, ys = min_max(x[window][known], y[known], points)
                result[name] = {"x": [_number(v) for v in xs.tolist()], "y": [_number(v) for v in ys.tolist()]}
        return result

    def _x(self, metric: str) -> np.ndarray:
        if metric == "hours":
            times = np.asarray(self.columns["time"], dtype=np.float64)
            return (times - times[0]) / 3600
        return np.asarray(self.columns[metric], dtype=np.float64)

    def _read_metrics(self) -> None:
        anew, lines = self._metrics.read()
        if anew:
            self.columns = {name: [] for name in METRICS}
        for line in lines:
            row = _named(json.loads(line))
            for name, values in self.columns.items():
                value = row.get(name)
                values.append(math.nan if value is None else float(value))


def _named(row: dict[str, Any]) -> dict[str, Any]:
    """A row under today's names, whatever release wrote it."""
    return {RUN_FILES.get(name, name): value for name, value in row.items()}


def check_run_folder(run_dir: Path) -> None:
    """Refuse a folder that is not one of a run.

    Raises:
        ConfigError: names the folder and what was expected.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"RUN: folder {str(run_dir)!r} does not exist; give the folder of a run, such as runs/tiny")
    if not (run_dir / "config.yaml").is_file() and not (run_dir / "metrics.jsonl").is_file():
        raise ConfigError(
            f"RUN: {str(run_dir)!r} holds neither config.yaml nor metrics.jsonl; give the folder of a run"
        )


def health(status: dict[str, Any], events: list[dict[str, Any]], now: float) -> dict[str, str]:
    """`level` (good, busy, warning, bad, done or unknown) and one sentence."""
    if not status:
        return {"level": "unknown", "text": "the run has left no status yet"}
    state, detail = status["state"], status["detail"]
    if state == "failed":
        return {"level": "bad", "text": f"failed: {detail}"}
    if state == "stopped":
        return {"level": "warning", "text": detail or "stopped"}
    if state == "finished":
        return {"level": "done", "text": f"finished, {status['batch']} batches"}
    silent = now - status["heartbeat"]
    if silent > _OLD_SECONDS:
        return {
            "level": "bad",
            "text": f"no sign of life for {duration(silent)}: the process has died, or its files no longer arrive here",
        }
    idle = now - status["progressed"]
    if state == "training" and idle > max(60.0, 5 * (status["batch_seconds"] or _FIRST_BATCH_SECONDS)):
        return {"level": "warning", "text": f"nothing has moved for {duration(idle)}"}
    warned = [e for e in events if e["level"] != "info" and now - e["time"] < 600]
    if warned:
        return {"level": "warning", "text": f"{state}; {warned[-1]['text']}"}
    if state != "training":
        return {"level": "busy", "text": detail or state}
    return {"level": "good", "text": "all well"}


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 5 min`, `2 d 4 h`."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{whole} s"


def _number(value: float) -> float | None:
    """Six digits are more than a chart shows; NaN and infinities are null in JSON."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
