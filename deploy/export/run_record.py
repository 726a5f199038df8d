"""What the folder of a run says about one of its checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.file import load_resolved
from common.config.run import RunConfig
from deploy.checkpoints import FINAL, MANIFEST
from deploy.dashboard.line_file import LineFile


@dataclass(frozen=True)
class RunRecord:
    """`manifest` has the checkpoint's counters, `metrics` is the row of its last rollout batch; `summary` is of the
    finished run, and empty for a checkpoint before its end."""

    config: RunConfig
    manifest: dict[str, Any]
    summary: dict[str, Any]
    metrics: dict[str, Any]

    @property
    def base(self) -> str:
        """The name of the model that the student was made of."""
        return public_name(self.config.model.path)


def public_name(model: str) -> str:
    """The hub id of a model, or the name of its folder or file, without its place on this machine."""
    path = Path(model)
    local = path.exists() or path.is_absolute() or path.parts[0] in (".", "..")
    return path.name if local else model


def run_record(checkpoint: Path) -> RunRecord | None:
    """The record of a checkpoint in its run's folder; None: the folder is of no run, or a copy.

    Raises:
        ConfigError: the run's config.yaml cannot be read.
    """
    checkpoint = checkpoint.resolve()
    run = checkpoint.parent.parent
    if checkpoint.parent.name != "checkpoints" or not (run / "config.yaml").is_file():
        return None
    manifest = _json(checkpoint / MANIFEST)
    _, lines = LineFile(run / "metrics.jsonl").read()
    rows = [row for row in map(json.loads, lines) if row["batch"] < manifest.get("batches", 0)]
    summary = _json(run / "summary.json") if checkpoint.name == FINAL else {}
    return RunRecord(load_resolved(run / "config.yaml"), manifest, summary, rows[-1] if rows else {})


def _json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.is_file() else {}
