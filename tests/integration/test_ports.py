"""What a run on one machine opens: ports on loopback, and Ray's, which ask for a token that a stranger has not."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from http.client import HTTPException

import psutil
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


def test_every_port_is_on_loopback_or_asks_for_a_token(tmp_path):
    command = [
        sys.executable, "-m", "deploy", "train", "tiny", "--teacher.backend", "transformers", "--dashboard.enabled",
        "true", "--dashboard.port", "0", "--evaluation.problems", "null", "--publish.transport", "broadcast",
        "--rollout.prompts_per_batch", "8", "--output_dir", str(tmp_path),
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    log, metrics = tmp_path / "log", tmp_path / "tiny" / "metrics.jsonl"
    with log.open("w") as out:
        run = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            deadline = time.monotonic() + 240
            while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
                assert run.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            opened = [
                (connection.laddr, process.name(), process.pid)
                for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
                for connection in process.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            ]
            outside = [
                (a, name, pid) for a, name, pid in opened if a.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
            ]
            heads = [address.port for address, name, _ in outside if name == "gcs_server"]
            answers = {(name, address.port): ask(address) for address, name, _ in outside}
            strangers = [join(heads[0], environment | without) for without in NO_TOKEN]
        finally:
            run.terminate()
            run.wait(timeout=90)
    assert all(stranger.returncode and "Failed to connect" in stranger.stderr for stranger in strangers), strangers
    # of what speaks HTTP, a stranger gets numbers about Ray's processes, and a refusal of everything else
    assert {port for port, answer in answers.items() if answer[0] == 200} == {
        port for port, answer in answers.items() if b"# HELP" in answer[1]
    }
    assert any(name == "ray::RuntimeEnvAgent" and answer[0] == 401 for (name, _), answer in answers.items())
    workers = Counter(pid for _, name, pid in outside if name.startswith("ray::") and not name.endswith("Agent"))
    assert workers and set(workers.values()) == {1}, "a worker of Ray listens for Ray, and for nobody else"
    assert sum(pid == run.pid for _, _, pid in outside) == 1, "nor does the driver"
    assert any(a.ip == "127.0.0.1" for a, _, _ in opened)


NO_TOKEN = [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}]


def join(port: int, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A stranger's try to join the cluster."""
    script = f"import ray; ray.init('127.0.0.1:{port}', log_to_driver=False)"
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)


def ask(address) -> tuple[int, bytes]:
    """Status and beginning of what a web client gets without a token; 0 where nobody speaks HTTP."""
    host = "127.0.0.1" if address.ip in ("::", "0.0.0.0") else address.ip
    try:
        with urllib.request.urlopen(f"http://{host}:{address.port}/", timeout=5) as answer:
            return answer.status, answer.read(200)
    except urllib.error.HTTPError as error:
        return error.code, b""
    except (OSError, HTTPException):
        return 0, b""
