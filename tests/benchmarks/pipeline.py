"""The whole loop: where the wall time of a batch goes, at staleness 0 and 1."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.models import save_random_model

_WARM_UP = 2  # the first batches load libraries and allocate
_STAGES = ("rollout", "teacher", "learner", "publish")
_BUSY = {"rollout actors": "rollout", "learner": "learner", "the slower of both": "slower_role"}


def measure(size: str, device: str, batches: int) -> Iterator[dict[str, Any]]:
    """A row per staleness, also printed as a table: mean seconds of a batch and of its stages (busiest actor), the
    share of the wall time in which no actor computes, and how busy rollouts and learner are.

    `tiny` is the preset of that name, whose curriculum goes through all of its lengths within the run. Of other sizes
    a random model generates 64 responses of 256 tokens a batch for four updates. On CUDA there are one rollout actor
    and one rank, and this has a GPU of its own where there are two.

    Raises:
        CalledProcessError: a run failed; its output was shown.
    """
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["--curriculum.batches", str(batches)] if size == "tiny" else _of_a_size(size, device, folder)
        overrides += _on_gpus() if device == "cuda" else []
        for staleness in (0, 1):
            made = run(["--pipeline.staleness", str(staleness), *overrides], batches)
            row = {"size": size, "staleness": staleness, "batches": batches, **metrics(made)}
            print(table(row), flush=True)
            yield row


def _of_a_size(size: str, device: str, folder: str) -> list[str]:
    save_random_model(size, device, folder)
    return [
        "--model.path", folder, "--curriculum.min_tokens", "256", "--curriculum.max_tokens", "256",
        "--rollout.prompts_per_batch", "64", "--rollout.slots", "64", "--rollout.unmasking", "{rule: static}",
        "--learner.batch_rows", "16",
        "--learner.max_tokens_per_microbatch", "12288", "--teacher.max_batched_tokens", "8192",
        "--pipeline.stage_timeout_s", "600",
    ]  # fmt: skip


def _on_gpus() -> list[str]:
    share = 1 if torch.cuda.device_count() > 1 else 0.5
    backend = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    made = [
        "--learner.ranks", "1", "--learner.resources.gpus", str(share), "--learner.liger_kernels", "true",
        "--rollout.actors", "1", "--rollout.resources.gpus", str(share / 2), "--teacher.backend", backend,
        "--teacher.resources.gpus", str(share / 2), "--teacher.gpu_memory_utilization", "0.4",
    ]  # fmt: skip
    return made + [text for role in ("rollout", "teacher", "learner") for text in (f"--{role}.dtype", "bfloat16")]


def table(row: dict[str, Any]) -> str:
    """Markdown: seconds of a mean batch by stage, and shares of its wall time."""
    wall = row["seconds_batch"]
    lines = [f"| staleness {row['staleness']} | seconds a batch | share of the wall time |", "| --- | ---: | ---: |"]
    for stage in _STAGES:
        seconds = row[f"seconds_{stage}"]
        lines.append(f"| {stage}, busiest actor | {seconds:.3f} | {seconds / wall:.1%} |")
    lines.append(f"| nobody computes | {row['overhead'] * wall:.3f} | {row['overhead']:.1%} |")
    lines.append(f"| wall time | {wall:.3f} | 100% |")
    busy = ", ".join(f"{name} {row[f'busy_{key}']:.1%}" for name, key in _BUSY.items())
    return "\n".join([*lines, "", f"busy: {busy}"])


def run(overrides: list[str], batches: int) -> list[dict[str, float]]:
    """The metrics of so many batches of the tiny preset, in a process and a Ray of its own."""
    quiet = {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "deploy", "train", "tiny", *_fields(overrides, batches, folder)]
        subprocess.run(command, check=True, stdout=sys.stderr, env=quiet | os.environ)
        lines = (Path(folder) / "tiny" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _fields(overrides: list[str], batches: int, folder: str) -> list[str]:
    return [
        "--output_dir", folder, "--evaluation.problems", "null", "--pipeline.max_batches", str(batches), *overrides,
    ]  # fmt: skip


def metrics(rows: list[dict[str, float]]) -> dict[str, float]:
    """Over the batches after the warm-up: means, and shares of their whole wall time."""
    rows = rows[_WARM_UP:] if len(rows) > _WARM_UP else rows
    wall = sum(row["seconds/batch"] for row in rows)

    def share(name: str) -> float:
        return sum(row[name] * row["seconds/batch"] for row in rows) / wall

    made = {"seconds_batch": wall / len(rows)}
    made |= {f"seconds_{stage}": sum(row[f"seconds/{stage}"] for row in rows) / len(rows) for stage in _STAGES}
    slower = max(("rollout", "learner"), key=lambda role: made[f"seconds_{role}"])
    made |= {
        "overhead": share("overhead"),
        "busy_rollout": share("busy/rollout"),
        "busy_learner": share("busy/learner"),
    }
    return made | {"busy_slower_role": share(f"busy/{slower}")}
