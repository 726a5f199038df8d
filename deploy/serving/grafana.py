"""The Grafana dashboard of servers: `python -m deploy.serving.grafana` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deploy.monitoring.panels import Panel, data_source, laid_out, selector, series, stat

FILE = Path(__file__).parents[1] / "kuberay" / "serving" / "monitoring" / "opdlm-serve.json"

_PERCENTILES = (0.5, 0.9, 0.99)


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana's JSON model; it asks for a Prometheus data source and for pods."""
    return {
        "uid": "opdlm-serve",
        "title": "OPDLM servers",
        "tags": ["opdlm"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [data_source(), selector("pod", "opdlm_serve_slots")]},
        "panels": laid_out([*_first_row(), *_lines()]),
    }


def queries() -> list[str]:
    """Every Prometheus query of the dashboard."""
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def main() -> None:
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n")
    print(f"wrote {FILE}")


def _first_row() -> list[Panel]:
    steps, tokens = _rate("steps_total"), _rate("tokens_total")
    failed = _rate("requests_total", status="4..|5..")
    return [
        stat("Tokens per second", "", "of finished responses", tokens),
        stat("Tokens per step", "", "of finished responses, for each denoising step", f"{tokens} / {steps}"),
        stat("Slots in use", "share", "of all pods", f"{_sum('running')} / {_sum('slots')}"),
        stat("Waiting", "", "sequences in the queues", _sum("waiting")),
        stat(
            "First block",
            "s",
            "nine of ten sequences have theirs within this time",
            _quantile(0.9, "first_block_seconds"),
        ),
        stat(
            "Not answered",
            "share",
            "requests refused or failed",
            f"({failed} or vector(0)) / {_rate('requests_total')}",
        ),
    ]


def _lines() -> list[Panel]:
    prompts, known = _rate("prompt_tokens_total"), _rate("prefix_tokens_total")
    first, whole = (
        {f"{100 * q:g}%": _quantile(q, name) for q in _PERCENTILES}
        for name in ("first_block_seconds", "sequence_seconds")
    )
    at_work = {name: _sum(name) for name in ("running", "waiting", "slots")}
    tokens = {"responses": _rate("tokens_total"), "prompts": prompts, "prompts, cached already": known}
    ended = {"{{finish_reason}}": _rate("sequences_total", by="finish_reason"), "cancelled": _rate("cancelled_total")}
    per_step = f"{_rate('tokens_total', by='pod')} / {_rate('steps_total', by='pod')}"
    return [
        series("Requests per second", "", "by HTTP status", {"{{status}}": _rate("requests_total", by="status")}),
        series("Sequences", "", "in slots, in the queues, and how many slots there are", at_work),
        series("Tokens per second", "", "of finished sequences", tokens),
        series("Time to the first block", "s", "from a sequence's arrival", first),
        series("Time to the end", "s", "from a sequence's arrival", whole),
        series("Sequences that ended, per second", "", "by what ended them", ended),
        series("Tokens per step", "", "how parallel the decoding is", {"{{pod}}": per_step}),
        series(
            "Passes per second", "", "forwards over all running sequences", {"{{pod}}": _rate("passes_total", by="pod")}
        ),
        series(
            "Version of the weights",
            "",
            "how often a pod has read them again",
            {"{{pod}}": _sum("weights_version", by="pod")},
        ),
    ]


def _of_pods(metric: str, **labels: str) -> str:
    matchers = ['pod=~"$pod"', *(f'{name}=~"{value}"' for name, value in labels.items())]
    return f"opdlm_serve_{metric}{{{', '.join(matchers)}}}"


def _sum(metric: str, by: str = "") -> str:
    return f"sum{f' by ({by}) ' if by else ''}({_of_pods(metric)})"


def _rate(metric: str, by: str = "", **labels: str) -> str:
    return f"sum{f' by ({by}) ' if by else ''}(rate({_of_pods(metric, **labels)}[5m]))"


def _quantile(share: float, metric: str) -> str:
    return f"histogram_quantile({share}, {_rate(f'{metric}_bucket', by='le')})"


if __name__ == "__main__":
    main()
