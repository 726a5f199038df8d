"""The Grafana dashboard of runs, generated from the metric registries: `python -m deploy.monitoring.grafana` writes it.

Every metric has a panel. Those that belong together share one: `seconds/rollout`, `seconds/teacher`, ... lie on one
axis, and so do `rollout/tokens_per_second`, `teacher/tokens_per_second`, .... A new entry of a registry needs nothing
here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deploy.monitoring.live_metrics import LIVE_METRICS, help_text, prometheus_name
from deploy.monitoring.metrics import METRICS
from deploy.monitoring.panels import Panel, data_source, laid_out, selector, series, stat

FILE = Path(__file__).parents[1] / "kuberay" / "monitoring" / "opdlm-run.json"

_ROLES = ("rollout", "teacher", "learner")
_NOT_PLOTTED = ("batch", "time")  # the first row says them


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana's JSON model; it asks for a Prometheus data source and for runs."""
    panels = [stat(*metric, legend="{{run}}") for metric in _first_row()]
    panels += [series("Since an actor answered", "s", "A flat line near 0 is healthy.", {"{{actor}}": _silence()})]
    not_finite = {"{{run}} {{metric}}": _of_run("not_finite", by="run, metric")}
    panels += [series("Not finite", "", LIVE_METRICS["not_finite"].meaning, not_finite)]
    budget = {"{{run}}": _of_run("restart_budget")}
    panels += [series("Restarts that an hour may have", "", LIVE_METRICS["restart_budget"].meaning, budget)]
    panels += [series("Share of the batch's wall time", "share", "How busy each stage is.", _shares())]
    panels += [_family(name, members) for name, members in families().items()]
    return {
        "uid": "opdlm-run",
        "title": "OPDLM runs",
        "tags": ["opdlm"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [data_source(), selector("run", prometheus_name("batches"))]},
        "panels": laid_out(panels),
    }


def families() -> dict[str, list[str]]:
    """Metrics by panel title: those of one kind and unit together."""
    found: dict[str, list[str]] = {}
    for name, spec in METRICS.items():
        if name in _NOT_PLOTTED:
            continue
        kind = _kind(name)
        units = {METRICS[other].unit for other in METRICS if _kind(other) == kind}
        title = f"{kind}, {spec.unit or 'number'}" if len(units) > 1 else kind
        found.setdefault(title.replace("_", " "), []).append(name)
    return found


def queries() -> list[str]:
    """Every Prometheus query of the dashboard."""
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def main() -> None:
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n")
    print(f"wrote {FILE}")


def _kind(name: str) -> str:
    """What a metric measures, without the stage: `seconds` of `seconds/rollout`; `learner` of its phases' seconds."""
    first, _, rest = name.partition("/")
    return name if not rest else rest if first in _ROLES and not rest.endswith("_s") else first


def _of_run(metric: str, by: str = "run") -> str:
    # one series a run: a run that goes on from a checkpoint has another process, hence other labels of Ray's
    return f'max by ({by}) ({prometheus_name(metric)}{{run=~"$run"}})'


def _first_row() -> list[tuple[str, str, str, str]]:
    """Title, unit, description and query of the metrics to look at first."""
    done = f"({_of_run('batch')} + 1)"
    batches, prompts = _of_run("batches"), _of_run("prompts")
    usual = f'max by (run) (avg_over_time({prometheus_name("seconds/batch")}{{run=~"$run"}}[30m]))'
    dropped = f'sum by (run) (max by (run, reason) ({prometheus_name("dropped_prompts")}{{run=~"$run"}}))'
    return [
        ("Done", "share", "rollout batches trained on, of all", f"{done} / {batches}"),
        ("Left", "s", "at the mean pace of the last half hour", f"({batches} - {done}) * {usual}"),
        ("Last answer", "s", "since any actor answered", f"time() - {_of_run('actor_heard')}"),
        ("Last batch", "s", "since a batch was logged", f"time() - {_of_run('time')}"),
        ("KL now", METRICS["kl"].unit, METRICS["kl"].meaning, _of_run("kl")),
        ("Dropped prompts", "share", "of the prompts read", f"({dropped} or {prompts} * 0) / {prompts}"),
    ]


def _silence() -> str:
    return f"time() - {_of_run('actor_heard', by='run, actor')}"


def _shares() -> dict[str, str]:
    whole = _of_run("seconds/batch")
    return {f"{{{{run}}}} {stage}": f"{_of_run(f'seconds/{stage}')} / {whole}" for stage in (*_ROLES, "publish")}


def _family(title: str, members: list[str]) -> Panel:
    text = "\n".join(f"{name}: {help_text(name)}" for name in members)
    legends = {f"{{{{run}}}} {_member(name, members)}".rstrip(): _of_run(name) for name in members}
    return series(title[0].upper() + title[1:], METRICS[members[0]].unit, text, legends)


def _member(name: str, members: list[str]) -> str:
    """What tells a metric from the others of its panel."""
    first, _, rest = name.partition("/")
    return "" if len(members) == 1 else rest if _kind(name) == first else first


if __name__ == "__main__":
    main()
