"""A disk that fills while a run goes on: warnings, nothing lost, and checkpoints again once there is space."""

import json
import subprocess
import sys
import time

import pytest

from tests.small_disk import fill, small_disk

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(600)]

BATCHES = 16
COMMAND = [
    sys.executable, "-m", "deploy", "train", "tiny", "--teacher.backend", "transformers", "--learner.ranks", "1",
    "--evaluation.problems", "null", "--pipeline.max_batches", str(BATCHES), "--rollout.prompts_per_batch", "8",
    "--pipeline.checkpoint_every_batches", "1", "--dashboard.enabled", "false",
]  # fmt: skip


def test_a_run_outlives_a_full_disk(tmp_path):
    log = tmp_path / "log"
    with small_disk(tmp_path / "disk", 64) as disk, log.open("w") as out:
        folder = disk / "tiny"

        def wait_for(condition) -> None:
            deadline = time.monotonic() + 240
            while not condition():
                assert run.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)

        def rows() -> list[str]:
            return (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []

        run = subprocess.Popen([*COMMAND, "--output_dir", str(disk)], stdout=out, stderr=subprocess.STDOUT)
        wait_for(lambda: list((folder / "checkpoints").glob("batch-*/manifest.json")))
        filling = fill(disk)
        wait_for(lambda: "could not be written to" in " ".join(log.read_text().split()))
        assert len(rows()) < BATCHES - 1, "the disk was full too late to see anything"
        filling.unlink()
        assert run.wait(timeout=240) == 0, log.read_text()

        assert [json.loads(row)["batch"] for row in rows()] == list(range(BATCHES))
        assert (folder / "summary.json").is_file()
        kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
        assert len(kept) == 3 and kept[-1] == "final", kept
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        assert any("could not be written to" in e["text"] for e in events if e["level"] == "warning")
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
