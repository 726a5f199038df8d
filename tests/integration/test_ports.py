"""What a run on one machine opens: ports on loopback, and Ray's, which ask for a token where that is set."""

import os
import secrets
import subprocess
import sys
import time
from collections import Counter

import psutil
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.mark.parametrize("transport", ["broadcast", "object_store"])
def test_every_port_is_on_loopback_or_asks_for_a_token(tmp_path, transport):
    command = [
        sys.executable, "-m", "deploy", "train", "tiny", "--teacher.backend", "transformers", "--dashboard.enabled",
        "true", "--dashboard.port", "0", "--evaluation.problems", "null", "--publish.transport", transport,
        "--rollout.prompts_per_batch", "8", "--output_dir", str(tmp_path),
    ]  # fmt: skip
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    log, metrics = tmp_path / "log", tmp_path / "tiny" / "metrics.jsonl"
    with log.open("w") as out:
        run = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        deadline = time.monotonic() + 240
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
            assert run.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
        opened = [
            (connection.laddr, process)
            for process in processes
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
        head = next(address.port for address, process in opened if process.name() == "gcs_server")
        strangers = [
            subprocess.run(
                [sys.executable, "-c", f"import ray; ray.init('{os.uname().nodename}:{head}', log_to_driver=False)"],
                env=environment | {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "0" * 64},
                capture_output=True,
                timeout=120,
            )
            for mode in ("disabled", "token")
        ]
        run.terminate()
        run.wait(timeout=90)
    assert all(stranger.returncode for stranger in strangers)
    outside = [(a.port, p) for a, p in opened if a.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")]
    of_workers = Counter(p.pid for _, p in outside if p.pid != run.pid and p.name().startswith(("ray::", "python")))
    assert set(of_workers.values()) == {1}, "a worker of Ray listens for Ray, and for nobody else"
    assert any(a.ip == "127.0.0.1" for a, _ in opened)
