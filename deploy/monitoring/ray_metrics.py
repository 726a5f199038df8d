"""The run's metrics as gauges on Ray's Prometheus endpoint: those of every batch, and of every actor as it answers."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from typing import Any, Self

from ray.util.metrics import Gauge

from deploy.monitoring.live_metrics import LIVE_METRICS, help_text, ray_name
from deploy.monitoring.metrics import METRICS
from deploy.monitoring.observer import Observer
from deploy.monitoring.pace import Pace

# Ray forgets a gauge that was not recorded for two of its report intervals, of 10 s by default
_RECORD_SECONDS = 2.0
_WATCHED = ("loss", "kl", "grad_norm")


class RayMetrics(Observer):
    """Gauges named `opdlm_...` (`ray_opdlm_...` in Prometheus) with the label `run`; one per entry of both registries.

    Gauges and not counters: what adds up over a run goes on from its checkpoint when the run does. Entered after
    `ray.init`; the agent of the driver's node serves them, and forgets them soon after the driver has ended.
    """

    def __init__(
        self, run: str, batches: int, prompts: int, dropped: Mapping[str, int], restart_budget: int = 0
    ) -> None:
        """`dropped` of the `prompts` read in one pass over the files were left out, by reason."""
        self._gauges = {name: _gauge(name, run) for name in (*METRICS, *LIVE_METRICS)}
        self._values: dict[tuple[str, str], float] = {}  # by metric and the value of its label
        self._set("batches", batches)
        self._set("prompts", prompts)
        self._set("restart_budget", restart_budget)
        for reason, count in dropped.items():
            self._set("dropped_prompts", count, reason)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_recording, name="ray-metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def end(self, error: BaseException | None) -> None:
        self._stop.set()
        self._thread.join()

    def heard(self, actor: str, facts: Mapping[str, Any]) -> None:
        self._set("actor_heard", facts["last_heard"], actor)

    def batch(self, metrics: Mapping[str, Any], pace: Pace | None = None) -> None:
        """Show one rollout batch; a metric that was not measured keeps its last value, and so does one that is not
        finite, which Ray would not export: `not_finite` tells of it."""
        for name, value in {**metrics, "time": time.time()}.items():
            if value is not None and math.isfinite(value):
                self._set(name, value)
        for name in _WATCHED:
            value = metrics.get(name)
            self._set("not_finite", float(value is not None and not math.isfinite(value)), name)

    def _set(self, name: str, value: float, label: str = "") -> None:
        self._values[name, label] = float(value)

    def _keep_recording(self) -> None:
        while not self._stop.wait(_RECORD_SECONDS):
            for (name, label), value in list(self._values.items()):
                key = _label(name)
                self._gauges[name].set(value, {key: label} if key else None)


def _gauge(name: str, run: str) -> Gauge:
    label = _label(name)
    gauge = Gauge(ray_name(name), help_text(name), ("run", label) if label else ("run",))
    return gauge.set_default_tags({"run": run})


def _label(name: str) -> str | None:
    return LIVE_METRICS[name].label if name in LIVE_METRICS else None
