"""The run's figures as gauges on Ray's Prometheus endpoint: those of every batch, and of every actor as it answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

from common.live_metrics import LIVE_METRICS, help_text, ray_name
from common.metrics import METRICS
from deploy.waiting import last_heard

_EXPORT_SECONDS = 5.0


class RayMetrics:
    """Gauges named `opdlm_...` (`ray_opdlm_...` in Prometheus) with the label `run`; one per entry of both registries.

    Gauges and not counters: what adds up over a run goes on from its checkpoint when the run does. Entered after
    `ray.init`; Ray's agent of the driver's node serves them while the driver lives.
    """

    def __init__(self, run: str, batches: int, prompts: int, dropped: Mapping[str, int]) -> None:
        self._gauges = {name: _gauge(name, run) for name in (*METRICS, *LIVE_METRICS)}
        self._set("batches", batches)
        self._set("prompts", prompts)
        for reason, count in dropped.items():
            self._set("dropped_prompts", count, {"reason": reason})
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_exporting, name="ray-metrics", daemon=True)

    def __enter__(self) -> RayMetrics:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def batch(self, metrics: Mapping[str, float | None]) -> None:
        """Export one rollout batch; a metric that was not measured keeps its last value."""
        for name, value in {**metrics, "time": time.time()}.items():
            if value is not None:
                self._set(name, value)

    def _keep_exporting(self) -> None:
        while not self._stop.wait(_EXPORT_SECONDS):
            for actor, heard in list(last_heard.items()):
                self._set("actor_heard", heard, {"actor": actor})

    def _set(self, name: str, value: float, labels: dict[str, str] | None = None) -> None:
        self._gauges[name].set(float(value), labels)


def _gauge(name: str, run: str) -> Gauge:
    label = LIVE_METRICS[name].label if name in LIVE_METRICS else None
    gauge = Gauge(ray_name(name), help_text(name), ("run", label) if label else ("run",))
    return gauge.set_default_tags({"run": run})
