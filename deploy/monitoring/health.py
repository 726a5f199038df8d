"""Warnings that follow from the metrics of the batches."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

_WATCHED = ("loss", "kl", "grad_norm")
_HISTORY = 20
_QUIET_BATCHES = 20  # a warning is not repeated sooner


class Health:
    """Looks at every batch's metrics beside those of the last twenty."""

    def __init__(self) -> None:
        self._history: deque[Mapping[str, Any]] = deque(maxlen=_HISTORY)
        self._lowest_kl = math.inf
        self._last: dict[str, float] = {}

    def warnings(self, metrics: Mapping[str, Any]) -> list[str]:
        """What deserves a look in this batch; one line each, with the numbers."""
        found = {f"{name} not finite": f"{name} is {metrics[name]}" for name in _WATCHED if not_finite(metrics[name])}
        if len(self._history) == _HISTORY:
            found |= self._against_history(metrics)
        self._history.append(metrics)
        batch = metrics["batch"]
        due = {key: text for key, text in found.items() if batch - self._last.get(key, -math.inf) >= _QUIET_BATCHES}
        self._last |= dict.fromkeys(due, batch)
        return [f"batch {batch:.0f}: {text}" for text in due.values()]

    def _against_history(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        found = {}
        usual = median(m["seconds/batch"] for m in self._history)
        if metrics["seconds/batch"] > 4 * usual:
            found["slow"] = f"took {metrics['seconds/batch']:.1f} s, usually {usual:.1f} s"
        recent = median(m["kl"] for m in self._history)
        self._lowest_kl = min(self._lowest_kl, recent)
        if recent > 2 * self._lowest_kl > 0:
            found["kl"] = f"KL rose: {recent:.3g} nats per token over {_HISTORY} batches, was {self._lowest_kl:.3g}"
        norm = median(m["grad_norm"] for m in self._history)
        if metrics["grad_norm"] > 10 * norm > 0:
            found["grad_norm"] = f"gradient norm {metrics['grad_norm']:.3g}, usually {norm:.3g}"
        return found


def not_finite(value: float) -> bool:
    return not math.isfinite(value)
