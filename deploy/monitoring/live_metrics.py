"""Metrics beside those of deploy/monitoring/metrics.py: facts of the run and of single actors, for Prometheus only.

They change while a batch is under way, or never; a row of `metrics.jsonl` has no place for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from deploy.monitoring.metrics import METRICS


@dataclass(frozen=True)
class LiveSpec:
    unit: str
    meaning: str
    label: str | None = None  # beside `run`


LIVE_METRICS: dict[str, LiveSpec] = {
    "batches": LiveSpec("", "rollout batches that the run will have in the end"),
    "prompts": LiveSpec("", "prompts read in one pass over the files, those left out too"),
    "dropped_prompts": LiveSpec("", "prompts left out of every pass", label="reason"),
    "not_finite": LiveSpec("", "1 where a metric of the last batch was NaN or infinite, else 0", label="metric"),
    "restart_budget": LiveSpec("", "replaced processes that a role may have in an hour (recovery.restarts)"),
    "actor_heard": LiveSpec("s", "Unix time at which an actor last answered", label="actor"),
}


def prometheus_name(metric: str) -> str:
    """The name under which Ray exports a metric: `seconds/publish` is `ray_opdlm_seconds_publish`."""
    return f"ray_{ray_name(metric)}"


def ray_name(metric: str) -> str:
    """The name that ray.util.metrics gets; it adds its prefix on export."""
    return "opdlm_" + metric.replace("/", "_")


def help_text(metric: str) -> str:
    """One line for Prometheus: the meaning, and the unit in brackets."""
    spec = METRICS[metric] if metric in METRICS else LIVE_METRICS[metric]
    return f"{spec.meaning} [{spec.unit}]" if spec.unit else spec.meaning
