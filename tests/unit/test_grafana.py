"""The Grafana dashboard and the alerts: made of the registries' names, complete, and as committed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from deploy.monitoring.grafana import FILE, dashboard, families, queries
from deploy.monitoring.live_metrics import LIVE_METRICS, help_text, prometheus_name
from deploy.monitoring.metrics import METRICS
from tests.prometheus import check_alerts, check_layout, check_queries, expressions

RULES = sorted(FILE.parent.glob("*rules.yaml"))
NAMES = {prometheus_name(name) for name in (*METRICS, *LIVE_METRICS)}


def used(expression: str) -> set[str]:
    return set(re.findall(r"\bray_opdlm_\w+", expression))


def test_committed_dashboard_is_up_to_date() -> None:
    assert json.loads(FILE.read_text()) == dashboard(), "run `python -m deploy.monitoring.grafana` and commit the file"


def test_every_metric_is_shown_under_its_name() -> None:
    assert len(NAMES) == len(METRICS) + len(LIVE_METRICS), "two metrics have one name in Prometheus"
    assert all(re.fullmatch(r"[a-z_][a-z0-9_]*", name) for name in NAMES)
    shown = set.union(*(used(query) for query in queries()))
    assert shown == NAMES


def test_every_metric_says_what_it_means() -> None:
    assert help_text("seconds/publish").endswith("[s]")
    assert all(help_text(name) for name in (*METRICS, *LIVE_METRICS))


def test_panels_hold_one_unit_each_and_do_not_overlap() -> None:
    for title, members in families().items():
        assert len({METRICS[name].unit for name in members}) == 1, title
    assert families()["tokens per second"] == [f"{r}/tokens_per_second" for r in ("rollout", "teacher", "learner")]
    check_layout(dashboard())


def test_queries_are_valid_promql(tmp_path: Path) -> None:
    check_queries([query.replace("$run", ".*") for query in queries()], tmp_path)


def test_alerts_name_metrics_that_exist() -> None:
    for file in RULES:
        assert all(used(expression) <= NAMES for expression in expressions(file))


@pytest.mark.parametrize("file", RULES, ids=lambda file: file.stem)
def test_alerts_fire_on_what_they_are_about(file: Path, tmp_path: Path) -> None:
    untested = check_alerts(file, tmp_path)
    assert file.stem != "run-rules" or not untested
