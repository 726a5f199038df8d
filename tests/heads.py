"""A real `ray start --head` of the tests' own, with its own ports and folder: it disturbs no other Ray."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import requests

RAY = str(Path(sys.executable).with_name("ray"))
_START_TIMEOUT_S = 300
_NODE_PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port",
               "metrics-export-port", "node-manager-port", "object-manager-port")  # fmt: skip


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nothing listens on; held open together, so that none is given twice."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Head:
    """A Ray head, with its worker nodes, from `__enter__` to `__exit__`; authenticated by a token file if asked to.

    `environment` is what a user's shell needs to talk to it, `address` its dashboard, `log` what it printed.
    """

    def __init__(self, num_cpus: int, token: bool = False, worker_cpus: int | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rh", dir="/tmp"))  # short: socket paths have a limit
        gcs, dashboard, client, autoscaler_metrics, dashboard_metrics = free_ports(5)
        self.gcs = f"127.0.0.1:{gcs}"
        self.address = f"http://127.0.0.1:{dashboard}"
        self.num_cpus, self.worker_cpus = num_cpus, worker_cpus
        self.log = self.folder / "log"
        self._processes: list[psutil.Process] = []
        self._head_options = ["--head", "--port", str(gcs), "--dashboard-host", "127.0.0.1", "--dashboard-port",
                              str(dashboard), "--ray-client-server-port", str(client), "--disable-usage-stats",
                              "--temp-dir", str(self.folder / "ray")]  # fmt: skip
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
        self.environment |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # as in an activated environment
            "RAY_AUTH_MODE": "token" if token else "disabled",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "AUTOSCALER_METRIC_PORT": str(autoscaler_metrics),
            "DASHBOARD_METRIC_PORT": str(dashboard_metrics),
            "RAY_metrics_report_interval_ms": "2000",
            "OMP_NUM_THREADS": "1",
        }
        self._headers: dict[str, str] = {}
        if token:
            file, secret = self.folder / "token", secrets.token_hex(32)
            file.write_text(secret)
            file.chmod(0o600)
            self.environment["RAY_AUTH_TOKEN_PATH"] = str(file)
            self._headers = {"Authorization": f"Bearer {secret}"}

    def __enter__(self) -> Head:
        self._start(self.num_cpus, self._head_options, nodes=1)
        if self.worker_cpus is not None:
            # in one folder the two nodes would unpack a job's files over each other
            self._start(self.worker_cpus, ["--address", self.gcs, "--temp-dir", str(self.folder / "worker")], nodes=2)
        return self

    def __exit__(self, *_: object) -> None:
        ours = [child for process in self._processes for child in [process, *process.children(recursive=True)]]
        for process in ours:
            if process.is_running():
                process.kill()
        psutil.wait_procs(ours, timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def metrics_discovery(self) -> Path:
        """The file in which Ray lists its metrics endpoints for Prometheus."""
        return self.folder / "ray" / "prom_metrics_service_discovery.json"

    def command(self, *words: str, timeout_s: float = 400) -> subprocess.CompletedProcess[str]:
        """Run a command as a user of this head would."""
        return subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def _start(self, cpus: int, options: list[str], nodes: int) -> None:
        numbered = [f"--{name}={port}" for name, port in zip(_NODE_PORTS, free_ports(len(_NODE_PORTS)), strict=True)]
        common = ["--num-cpus", str(cpus), "--object-store-memory", str(200 * 2**20), "--block"]
        with self.log.open("a") as log:
            process = subprocess.Popen(
                [RAY, "start", *options, *common, *numbered],
                env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._processes.append(psutil.Process(process.pid))
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._has(nodes):
            assert process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def _has(self, nodes: int) -> bool:
        try:
            answer = requests.get(f"{self.address}/nodes?view=summary", headers=self._headers, timeout=10)
            alive = [node["raylet"]["state"] == "ALIVE" for node in answer.json()["data"]["summary"]]
        except requests.ConnectionError:
            return False
        return sum(alive) >= nodes
