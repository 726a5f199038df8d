"""One `opdlm train` in a process and a Ray of its own, watched by its metrics, and ended early where it must be."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deploy.child_environment import child_environment

_POLL_SECONDS = 0.2
_SECOND_SIGNAL_SECONDS = 1.0

Row = dict[str, Any]  # a line of metrics.jsonl


@dataclass(frozen=True)
class TrainRun:
    """`start` is the Unix time of the command; `rows` are the run's metrics, one at least."""

    start: float
    rows: list[Row]

    @property
    def loading(self) -> float:
        """Seconds from the command to the start of training."""
        return self.rows[0]["time"] - self.rows[0]["seconds/batch"] - self.start

    @property
    def first_batch(self) -> float:
        """Seconds from there to the end of the first batch."""
        seconds: float = self.rows[0]["seconds/batch"]
        return seconds


def train(
    config: dict[str, Any],
    fields: Sequence[str],
    environment: Mapping[str, str],
    late: Callable[[TrainRun], bool] | None = None,
) -> TrainRun:
    """To its end, or until what it has done by then is `late`: then it is ended at once, without a checkpoint.

    Raises:
        CalledProcessError: the run failed; its output was shown.
    """
    quiet = {"RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1", "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE": "1"}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as out:
        file, metrics = Path(out) / "run.yaml", Path(out) / config["name"] / "metrics.jsonl"
        file.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "deploy", "train", str(file), "--output_dir", out, *fields]
        start = time.time()
        process = subprocess.Popen(command, stdout=sys.stderr, env=quiet | child_environment() | dict(environment))
        while process.poll() is None:
            run = TrainRun(start, _rows(metrics))
            if late and run.rows and late(run):
                _interrupt(process)
                return run
            time.sleep(_POLL_SECONDS)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        return TrainRun(start, _rows(metrics))


def _rows(file: Path) -> list[Row]:
    """Of the lines that are whole."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """The first signal asks for a checkpoint, the second ends the run at once (deploy/stop_signals.py)."""
    process.send_signal(signal.SIGINT)
    time.sleep(_SECOND_SIGNAL_SECONDS)
    process.send_signal(signal.SIGINT)
    process.wait()
