"""The demo in a short form, with its metrics asserted: `python -m tests.demo`.

The full demo (`make demo`) trains three times as long; here the student must have left zero by a clear margin.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

BATCHES = 120
SHORT = [
    "--pipeline.max_batches", str(BATCHES), "--curriculum.batches", "80", "--evaluation.count", "100",
    "--evaluation.every_batches", "0",
]  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "deploy", "train", "tiny", "--output_dir", folder, *SHORT]
        subprocess.run(command, check=True)
        summary = json.loads((Path(folder) / "tiny" / "summary.json").read_text())
    print(json.dumps(summary, indent=2))
    assert summary["teacher"]["exact_match"] >= 0.95
    assert summary["student_init"]["exact_match"] <= 0.05
    assert summary["student"]["static"]["exact_match"] >= 0.25
    assert summary["student"]["dynamic"]["exact_match"] >= 0.25
    assert summary["student"]["dynamic"]["tokens_per_step"] > 1.15
    assert summary["train"]["updates"] == 8 * BATCHES


if __name__ == "__main__":
    main()
