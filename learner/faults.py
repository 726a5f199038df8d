"""Faults: updates that are left out, since their loss or gradient is not finite, in the form in which `opdlm replay`
repeats them.

    faults/001/   fault.json           which update, what is not finite, ranks and config
                  trajectories.arrow   the trajectories of all its losses, with targets
                  model/               the student, as it was before the update

The optimizer's state is not kept: no step was made, and it decides nothing of loss and gradient.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from common.trajectory import write_spool

FACTS, RECORDS, MODEL = "fault.json", "trajectories.arrow", "model"


@dataclass(frozen=True)
class FaultFolder:
    """Where faults are kept, and at most how many of one rollout batch: each holds a model."""

    folder: Path
    most: int


def write_fault(folder: Path, record_batches: list[pa.RecordBatch], facts: dict[str, Any]) -> Path:
    """A new numbered folder with all but the model; returns it."""
    folder.mkdir(exist_ok=True)
    last = max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0)
    kept = folder / f"{last + 1:03d}"
    kept.mkdir()
    write_spool(kept / RECORDS, record_batches)
    (kept / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    return kept
