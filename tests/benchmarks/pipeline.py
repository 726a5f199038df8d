"""The whole loop: where the wall time of the tiny preset's batches goes, at staleness 0 and 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_WARM_UP = 2  # the first batches load libraries and allocate
_STAGES = ("rollout", "teacher", "learner", "publish")
_BUSY = {"rollout actors": "rollout", "learner": "learner", "the slower of both": "slower_role"}


def measure(size: str, device: str, batches: int) -> list[dict[str, Any]]:
    """A row per staleness, also printed as a table: mean seconds of a batch and of its stages (busiest actor), the
    share of the wall time in which no actor computes, and how busy rollouts and learner are.

    The curriculum goes through all of its lengths within the run.

    Raises:
        CalledProcessError: a run failed; its output was shown.
    """
    rows = []
    for staleness in (0, 1):
        made = run(["--pipeline.staleness", str(staleness), "--curriculum.batches", str(batches)], batches)
        rows.append({"size": size, "staleness": staleness, "batches": batches, **figures(made)})
        print(table(rows[-1]), flush=True)
    return rows


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
        command = [
            sys.executable, "-m", "deploy", "train", "tiny", "--output_dir", folder,
            "--evaluation.problems", "null", "--pipeline.max_batches", str(batches), *overrides,
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=sys.stderr, env=quiet | os.environ)
        lines = (Path(folder) / "tiny" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def figures(rows: list[dict[str, float]]) -> dict[str, float]:
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
