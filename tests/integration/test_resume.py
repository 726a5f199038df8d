"""Invariant 5: a run that was stopped or killed and resumed trains the same batches, with the same losses."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

BATCHES = 6
COMMAND = [
    sys.executable, "-m", "deploy", "train", "tiny", "--teacher.backend", "transformers",
    "--evaluation.problems", "null", "--pipeline.max_batches", str(BATCHES), "--rollout.prompts_per_batch", "16",
    "--pipeline.checkpoint_every_batches", "2", "--pipeline.spool", "true", "--learner.warmup_batches", "1",
]  # fmt: skip


def metrics(folder: Path) -> list[dict[str, float]]:
    file = folder / "tiny" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def interrupt(folder: Path, sent: signal.Signals, after: int) -> int:
    """Start the run, send a signal to its driver after some batches; returns the exit status."""
    with (folder / "log").open("w") as log:
        run = subprocess.Popen([*COMMAND, "--output_dir", str(folder)], stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 150
        while len(metrics(folder)) < after:
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        left_behind = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(sent)
        status = run.wait(timeout=90)
    for process in left_behind:  # a killed driver cannot take its Ray along
        if process.is_running():
            process.kill()
    return status


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> list[dict[str, float]]:
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run([*COMMAND, "--output_dir", str(folder)], check=True, capture_output=True)
    return metrics(folder)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 128 + 15), (signal.SIGKILL, -9)])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, uninterrupted, sent, status):
    assert interrupt(tmp_path, sent, after=3) == status
    complete = sorted((tmp_path / "tiny" / "checkpoints").glob("batch-*/manifest.json"))
    if sent == signal.SIGTERM:
        assert int(complete[-1].parent.name.removeprefix("batch-")) >= 3
    else:
        assert complete[-1].parent.name == "batch-000002"

    done = subprocess.run(
        [*COMMAND, "--output_dir", str(tmp_path), "--resume", "auto"], capture_output=True, text=True, check=True
    )
    assert "going on from" in done.stdout
    resumed = metrics(tmp_path)
    assert [m["batch"] for m in resumed] == list(range(BATCHES))
    for a, b in zip(uninterrupted, resumed, strict=True):
        for name in ("loss", "kl", "lr", "response_tokens", "updates", "weights_version", "response_limit"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), (name, a["batch"])
    assert (tmp_path / "tiny" / "summary.json").exists()
    assert (tmp_path / "tiny" / "checkpoints" / "final" / "model.safetensors").exists()

    again = subprocess.run(
        [*COMMAND, "--output_dir", str(tmp_path), "--resume", "auto"], capture_output=True, text=True
    )
    assert again.returncode == 0
    other = subprocess.run(
        [*COMMAND, "--output_dir", str(tmp_path), "--learner.lr", "3e-4"], capture_output=True, text=True
    )
    assert other.returncode == 2
    assert "finished run" in other.stderr
