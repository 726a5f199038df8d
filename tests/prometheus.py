"""A real Prometheus that scrapes a head of tests/heads.py, and promtool for rules and queries."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests.heads import free_ports

_START_TIMEOUT_S = 60


class Prometheus:
    """Scrapes every second from `__enter__` to `__exit__`.

    Its targets are those of `discovery`, the service discovery file that a Ray head writes.
    """

    def __init__(self, program: str, folder: Path, discovery: Path) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "prometheus.log"
        job = {"job_name": "ray", "file_sd_configs": [{"files": [str(discovery)], "refresh_interval": "1s"}]}
        config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": [job]}
        file = folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        self._command = [program, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}",
                         f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip

    def __enter__(self) -> Prometheus:
        with self._log.open("w") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._ready():
            assert self._process.poll() is None and time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def series(self, query: str, begin: float, end: float) -> list[dict[str, Any]]:
        """Series of a query between two Unix times, a point a second."""
        answer = requests.get(
            f"{self.url}/api/v1/query_range", {"query": query, "start": begin, "end": end, "step": 1}, timeout=30
        ).json()
        assert answer["status"] == "success", answer
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def _ready(self) -> bool:
        try:
            return requests.get(f"{self.url}/-/ready", timeout=5).ok
        except requests.ConnectionError:
            return False


def check_queries(queries: list[str], folder: Path) -> None:
    """Each is valid PromQL; `folder` is a temporary one."""
    rules = [{"record": f"q{n}", "expr": query} for n, query in enumerate(queries)]
    (folder / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    _promtool("check", "rules", "queries.yaml", folder=folder)


def check_alerts(file: Path, folder: Path) -> set[str]:
    """Run the unit tests beside a PrometheusRule, on its `spec`, a plain rule file; returns the alerts without one."""
    spec = yaml.safe_load(file.read_text())["spec"]
    (folder / file.name).write_text(yaml.safe_dump(spec))
    tests = file.with_name(f"{file.stem}_test.yaml")
    shutil.copy(tests, folder)
    _promtool("check", "rules", file.name, folder=folder)
    _promtool("test", "rules", tests.name, folder=folder)
    tested = set(re.findall(r"alertname: (\w+)", tests.read_text()))
    return {rule["alert"] for group in spec["groups"] for rule in group["rules"]} - tested


def expressions(file: Path) -> list[str]:
    """Those of a PrometheusRule's alerts."""
    return [rule["expr"] for group in yaml.safe_load(file.read_text())["spec"]["groups"] for rule in group["rules"]]


def check_layout(dashboard: dict[str, Any]) -> None:
    """Panels lie within the page, and on no other."""
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        own = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert max(x for x, _ in own) < 24 and not own & cells, panel["title"]
        cells |= own


def _promtool(*arguments: str, folder: Path) -> None:
    program = shutil.which("promtool")
    if not program:
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    done = subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
