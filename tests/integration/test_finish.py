"""The two ends of a run: what is missing after training is made without training again, and a stop is heeded at once
while models load and while the student is evaluated."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

COMMAND = [sys.executable, "-m", "deploy", "train", "tiny", "--teacher.backend", "transformers"]
SMALL = ["--pipeline.max_batches", "2", "--evaluation.count", "4", "--evaluation.every_batches", "0"]
SMALL += ["--evaluation.held_out_prompts", "5", "--evaluation.held_out_tokens", "40"]
STOP_SECONDS = 15.0  # Ray's own end takes most of them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two batches."""
    output = tmp_path_factory.mktemp("runs")
    train(output)
    return output / "tiny"


def train(output: Path, *more: str) -> str:
    command = [*COMMAND, "--output_dir", str(output), *SMALL, *more]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_a_finished_training_without_evaluation_only_evaluates(folder):
    before = summary(folder)
    (folder / "summary.json").unlink()  # as a process leaves it that dies in the last evaluation
    weights = folder / "checkpoints" / "final" / "model.safetensors"
    held_out = folder / "held_out.json"
    written, answered = weights.stat().st_mtime_ns, held_out.stat().st_mtime_ns
    said = train(folder.parent, "--resume", "auto")
    assert "the training is finished, what is missing is its evaluation" in said and "batch 1/2" not in said
    after = summary(folder)
    for result in (before, after):
        for evaluated in (result["teacher"], *result["student"].values()):
            for measured in ("seconds", "tokens_per_second"):
                evaluated.pop(measured)
    kl = [result["held_out_kl"].pop("by_offset") for result in (before, after)]
    assert kl[0] == pytest.approx(kl[1])
    assert [result["held_out_kl"].pop("mean") for result in (before, after)] == pytest.approx([sum(kl[0]) / 4] * 2)
    assert after == before
    assert weights.stat().st_mtime_ns == written and held_out.stat().st_mtime_ns == answered
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_finished_run_is_finished_for_its_own_config_only(folder):
    start = time.monotonic()
    train(folder.parent, "--resume", "auto")
    assert time.monotonic() - start < 15, "nothing was started"
    edited = subprocess.run(
        [*COMMAND, "--output_dir", str(folder.parent), *SMALL, "--resume", "auto", "--learner.lr", "1e-3"],
        capture_output=True,
        text=True,
    )
    assert edited.returncode == 2
    assert "learner.lr was 0.0006 and is 0.001" in edited.stderr


@pytest.mark.long
def test_another_evaluation_is_made_of_the_finished_training(folder):
    said = train(folder.parent, "--resume", "auto", "--evaluation.count", "3")
    assert "batch 1/2" not in said
    result = summary(folder)
    assert [result["teacher"]["problems"], result["student"]["dynamic"]["problems"]] == [3, 3]
    assert result["train"]["updates"] == 16


@pytest.mark.parametrize("until", ["loading models", pytest.param("evaluating the teacher", marks=pytest.mark.long)])
def test_a_stop_is_heeded_while_nothing_is_trained_yet(tmp_path, until):
    many = ["--evaluation.count", "1000", "--evaluation.problems", "deploy/data/word_problems_train.jsonl"]
    process = subprocess.Popen(
        [*COMMAND, "--output_dir", str(tmp_path), *SMALL, *many],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    for line in process.stdout:
        if until in line:
            break
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert time.monotonic() - start < STOP_SECONDS
    assert "stopped after 0 of 2 batches" in said
    assert json.loads((tmp_path / "tiny" / "status.json").read_text())["state"] == "stopped"
