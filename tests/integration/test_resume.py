"""Invariant 5: a run that was stopped or killed and resumed trains the same batches, with the same losses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

BATCHES = 8
EVERY = 3
COMMAND = [
    sys.executable, "-m", "deploy", "train", "tiny", "--teacher.backend", "transformers",
    "--evaluation.problems", "null", "--pipeline.max_batches", str(BATCHES), "--rollout.prompts_per_batch", "8",
    "--rollout.samples_per_prompt", "2", "--pipeline.checkpoint_every_batches", str(EVERY),
    "--pipeline.spool", "true", "--learner.warmup_batches", "1",
    "--evaluation.held_out_prompts", "4", "--evaluation.held_out_tokens", "24",
    "--evaluation.every_batches", str(BATCHES),
]  # fmt: skip


def metrics(folder: Path) -> list[dict[str, float]]:
    file = folder / "tiny" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def newest(folder: Path) -> int:
    """Batches that the newest complete checkpoint holds."""
    complete = sorted((folder / "tiny" / "checkpoints").glob("batch-*/manifest.json"))
    return int(complete[-1].parent.name.removeprefix("batch-"))


def interrupt(folder: Path, arguments: list[str], sent: signal.Signals, after: int) -> int:
    """Start the run or go on with it, send a signal after some batches; returns the exit status.

    SIGTERM goes to the whole process group, as `timeout` and Slurm send it; SIGKILL to the driver alone.
    """
    with (folder / "log").open("w") as log:
        command = [*COMMAND, *arguments, "--resume", "auto"]
        run = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.monotonic() + 240
        while len(metrics(folder)) < after:
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        left_behind = psutil.Process(run.pid).children(recursive=True)
        os.killpg(run.pid, sent) if sent == signal.SIGTERM else run.send_signal(sent)
        status = run.wait(timeout=90)
    for process in left_behind:  # a killed driver cannot take its Ray along
        if process.is_running():
            process.kill()
    return status


def hold_at(folder: Path, batch: int) -> Path:
    """Nobody reads from the pipe in the place of the batch's spool file, so the run waits there and goes no further."""
    pipe = folder / "tiny" / "spool" / f"batch-{batch:06d}.arrow"
    os.mkfifo(pipe)
    return pipe


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> list[dict[str, float]]:
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run([*COMMAND, "--output_dir", str(folder)], check=True, capture_output=True)
    return metrics(folder)


def test_a_run_stopped_then_killed_equals_the_uninterrupted_one(tmp_path, uninterrupted):
    copies = tmp_path / "copies"
    run = ["--output_dir", str(tmp_path), "--pipeline.copy_checkpoints_to", f"file://{copies}"]
    run += ["--wandb.enabled", "true", "--wandb.mode", "offline"]
    assert interrupt(tmp_path, run, signal.SIGTERM, after=1) == 128 + 15
    stopped = newest(tmp_path)
    assert 1 <= stopped < BATCHES - 2

    # the kill comes one batch after the next periodic checkpoint: what it lost is trained again
    periodic = stopped // EVERY * EVERY + EVERY
    pipe = hold_at(tmp_path, periodic + 1)
    assert interrupt(tmp_path, run, signal.SIGKILL, after=periodic + 1) == -9
    pipe.unlink()
    assert newest(tmp_path) == periodic
    assert len(metrics(tmp_path)) == periodic + 1
    assert {f"batch-{periodic:06d}"} <= {p.name for p in copies.iterdir()}

    done = subprocess.run([*COMMAND, *run, "--resume", "auto"], capture_output=True, text=True, check=True)
    assert f"going on from batch-{periodic:06d}" in done.stdout
    resumed = metrics(tmp_path)
    assert [m["batch"] for m in resumed] == list(range(BATCHES))
    for a, b in zip(uninterrupted, resumed, strict=True):
        for name in ("loss", "kl", "lr", "response_tokens", "updates", "weights_version", "response_limit"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), (name, a["batch"])
    # on the prompts, and the original's responses, that the first part of the run has held out
    assert resumed[-1]["eval/held_out_kl"] == pytest.approx(uninterrupted[-1]["eval/held_out_kl"], rel=1e-4)
    assert (tmp_path / "tiny" / "summary.json").exists()
    assert (tmp_path / "tiny" / "checkpoints" / "final" / "model.safetensors").exists()
    assert (copies / "final" / "model.safetensors").exists()
    logged = sorted((tmp_path / "tiny" / "wandb").glob("offline-run-*"))
    assert len(logged) >= 2 and len({folder.name.split("-")[-1] for folder in logged}) == 1, "one id for one run"

    again = subprocess.run([*COMMAND, *run, "--resume", "auto"], capture_output=True, text=True)
    assert again.returncode == 0
    other = subprocess.run([*COMMAND, *run, "--learner.lr", "3e-4"], capture_output=True, text=True)
    assert other.returncode == 2
    assert "finished run" in other.stderr
