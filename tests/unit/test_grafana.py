"""The Grafana dashboard and the alerts: made of the registries' names, complete, and as committed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.monitoring.grafana import FILE, dashboard, families, queries
from deploy.monitoring.live_metrics import LIVE_METRICS, help_text, prometheus_name
from deploy.monitoring.metrics import METRICS

RULES = sorted(FILE.parent.glob("*rules.yaml"))
NAMES = {prometheus_name(name) for name in (*METRICS, *LIVE_METRICS)}


def used(expression: str) -> set[str]:
    return set(re.findall(r"\bray_opdlm_\w+", expression))


def promtool(*arguments: str, folder: Path) -> None:
    program = shutil.which("promtool")
    if not program:
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    done = subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


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
    cells: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        own = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert max(x for x, _ in own) < 24 and not own & cells, panel["title"]
        cells |= own


def test_queries_are_valid_promql(tmp_path: Path) -> None:
    rules = [{"record": f"q{n}", "expr": query.replace("$run", ".*")} for n, query in enumerate(queries())]
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    promtool("check", "rules", "queries.yaml", folder=tmp_path)


def test_alerts_name_metrics_that_exist() -> None:
    for file in RULES:
        for group in yaml.safe_load(file.read_text())["spec"]["groups"]:
            assert all(used(rule["expr"]) <= NAMES for rule in group["rules"])


@pytest.mark.parametrize("file", RULES, ids=lambda file: file.stem)
def test_alerts_fire_on_what_they_are_about(file: Path, tmp_path: Path) -> None:
    """The unit tests beside the rules, on the plain rule file: the `spec` of the PrometheusRule."""
    spec = yaml.safe_load(file.read_text())["spec"]
    (tmp_path / file.name).write_text(yaml.safe_dump(spec))
    tests = file.with_name(f"{file.stem}_test.yaml")
    shutil.copy(tests, tmp_path)
    promtool("check", "rules", file.name, folder=tmp_path)
    promtool("test", "rules", tests.name, folder=tmp_path)
    tested = set(re.findall(r"alertname: (\w+)", tests.read_text()))
    if file.stem == "run-rules":
        assert tested == {rule["alert"] for group in spec["groups"] for rule in group["rules"]}
