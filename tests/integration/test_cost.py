"""What grows with vocabulary, prompts or batches is done once a process, never once a batch: cost follows tokens."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import call_counts

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def trained(folder: Path, batches: int) -> Counter[str]:
    """Calls and reads of all processes of a run with so many batches."""
    folder.mkdir()
    counts = folder / "counts"
    environment = os.environ | call_counts.environment(folder, counts, folder / "out")
    command = [
        sys.executable, "-m", "deploy", "train", "tiny", "--output_dir", folder / "out", "--data.limit", "128",
        "--teacher.backend", "transformers", "--rollout.actors", "2", "--learner.ranks", "1",
        "--rollout.stream_rows", "2", "--rollout.prompts_per_batch", "8", "--curriculum.min_tokens", "8",
        "--curriculum.max_tokens", "8", "--evaluation.problems", "null", "--dashboard.rollouts", "0",
        "--pipeline.max_batches", str(batches),
    ]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True, env=environment, stdout=sys.stderr)
    return call_counts.counted(counts)


def test_no_costly_call_and_no_read_is_made_once_a_batch_or_a_record_batch(tmp_path):
    few, many = trained(tmp_path / "few", 2), trained(tmp_path / "many", 6)
    assert few["vocabulary.py tokenizer_fingerprint"] >= 2, "the counter sees what actors and learner do at their start"
    assert any(name.startswith("prompts.py") for name in few)
    grown = {name: (few[name], many[name]) for name in few.keys() | many.keys() if many[name] > few[name]}
    grown.pop("read run.lock", None)  # a line, whatever the run
    assert grown == {}
    rows = (tmp_path / "many" / "out" / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(row)["queue/learner"] for row in rows) >= 6 * 4  # record batches of two rows
    sizes = [(tmp_path / name / "out" / "tiny" / "status.json").stat().st_size for name in ("few", "many")]
    assert sizes[1] < sizes[0] + 32, "what is written every second does not grow with the run"
