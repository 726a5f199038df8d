"""A run whose loss is not finite: it ends with a checkpoint and a sentence, or goes on within its budget."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from common.config.file import load_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

UNUSED_TOKEN = 200


@pytest.fixture
def command(tmp_path) -> list[str]:
    """Training on one's own responses, without sampler and teacher, from a model with one weight that overflows."""
    model = tmp_path / "model"
    shutil.copytree(load_config("tiny").model.path, model)
    weights = load_file(model / "model.safetensors")
    embedding = next(name for name in weights if "embed_tokens" in name)
    weights[embedding][UNUSED_TOKEN] = 3e38
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    data = tmp_path / "data.jsonl"
    lines = [{"question": f"What is {i} plus 1?", "response": f"Answer: {i + 1}"} for i in range(16)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [
        sys.executable, "-m", "deploy", "train", "tiny", "--model.path", str(model), "--data.prompts", str(data),
        "--data.responses", str(data), "--objective.method", "sft", "--evaluation.problems", "null",
        "--output_dir", str(tmp_path), "--pipeline.max_batches", "2", "--rollout.prompts_per_batch", "8",
        "--rollout.samples_per_prompt", "1", "--learner.batch_rows", "8", "--dashboard.enabled", "false",
        "--learner.ranks", "1",
    ]  # fmt: skip


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_run_ends_with_a_checkpoint_and_names_the_fault(tmp_path, command):
    run = subprocess.run(command, capture_output=True, text=True)
    said = " ".join(run.stderr.split())
    folder = tmp_path / "tiny"
    assert run.returncode == 1, run.stdout + run.stderr
    assert "run failed: update 0 is left out: the loss is nan" in said
    assert f"are in '{folder}/faults/001', which opdlm replay repeats; 1 updates were left out" in said
    assert "learner.nonfinite_updates allows 0" in said
    assert (folder / "checkpoints" / "batch-000001" / "manifest.json").is_file()
    assert [row["nonfinite_updates"] for row in rows(folder)] == [1]

    replay = subprocess.run(
        [sys.executable, "-m", "deploy", "replay", str(folder / "faults" / "001")], capture_output=True, text=True
    )
    assert replay.returncode == 0, replay.stderr
    assert "update 0 was left out" in replay.stdout and "repeated: loss nan" in replay.stdout

    # the weights are those of the model still: the budget lets the second batch be tried, and the run ends well
    again = subprocess.run(
        [*command, "--resume", "auto", "--learner.nonfinite_updates", "2"], capture_output=True, text=True
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert [row["nonfinite_updates"] for row in rows(folder)] == [1, 2]
    assert (folder / "checkpoints" / "final" / "model.safetensors").is_file()
