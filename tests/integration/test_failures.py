"""Where no worker may be replaced, one that dies or stops ends the run: its name, the cause, a non-zero exit status."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

COMMAND = [
    sys.executable, "-m", "deploy", "train", "tiny", "--teacher.backend", "transformers",
    "--evaluation.problems", "null", "--learner.ranks", "1", "--rollout.actors", "1",
    "--pipeline.stage_timeout_s", "60", "--recovery.restarts", "0",
]  # fmt: skip


@pytest.mark.parametrize(
    ("role", "sent", "message", "overrides"),
    [
        ("RolloutActor", signal.SIGKILL, "rollout-0 died while", []),
        pytest.param("LearnerRank", signal.SIGKILL, "learner-0 died while", [], marks=pytest.mark.long),
        pytest.param(
            "TeacherActor", signal.SIGSTOP, "teacher-0 gave no sign of life for .* budget of 0 replaced teacher", [],
            marks=pytest.mark.long,
        ),
        pytest.param(
            "RolloutActor", signal.SIGSTOP, "rollout-0 gave no sign of life",
            ["--publish.transport", "broadcast", "--pipeline.staleness", "1"], marks=pytest.mark.long,
        ),
    ],
)  # fmt: skip
def test_broken_worker_ends_the_run_by_name(tmp_path, role, sent, message, overrides):
    log = tmp_path / "log"
    command = [*COMMAND, "--output_dir", str(tmp_path), *overrides]
    with log.open("w") as out:
        run = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        metrics = tmp_path / "tiny" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2, 300, log)
        victim = next(p for p in psutil.Process(run.pid).children(recursive=True) if role in "".join(p.cmdline()))
        os.kill(victim.pid, sent)
        status = run.wait(timeout=90)
        if sent == signal.SIGSTOP and victim.is_running():
            victim.kill()
    text = " ".join(log.read_text().split())
    assert status == 1, text
    assert "run failed" in text
    assert re.search(message, text), text
    assert not (tmp_path / "tiny" / "summary.json").exists()
    saved = list((tmp_path / "tiny" / "checkpoints").glob("batch-*/manifest.json"))
    assert bool(saved) == (role != "LearnerRank")


def wait_for(condition, timeout_s: float, log) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
