"""How far the runs of an ablation are, from their own files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from deploy.ablation.runs import Arm
from deploy.run_lock import living_owner

_AT_REST = ("finished", "stopped", "failed")


@dataclass(frozen=True)
class Standing:
    """The state of one run, as its status says; "not begun": there is none, "interrupted": it died. `batch` of
    `batches` are trained on; `kl` is that of the last, in nats, `held_out_kl` of the last evaluation."""

    state: str = "not begun"
    batch: int = 0
    batches: int = 0
    kl: float | None = None
    held_out_kl: float | None = None

    @property
    def in_progress(self) -> bool:
        return self.state not in (*_AT_REST, "not begun", "interrupted")


def standing(arm: Arm) -> Standing:
    folder = arm.config.run_dir
    if not (folder / "status.json").is_file():
        return Standing()
    status = json.loads((folder / "status.json").read_text())
    state = status["state"]
    if state not in _AT_REST and living_owner(folder) is None:
        state = "interrupted"
    return Standing(state, status["batch"], status["batches"], _newest(arm, "kl"), _newest(arm, "eval/held_out_kl"))


def runs_table(runs: Sequence[tuple[Arm, Standing]]) -> Table:
    """One row a run."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("arm", "seed", "state", "batches", "KL", "held-out KL"):
        table.add_column(column, justify="left" if column in ("arm", "state") else "right")
    for arm, now in runs:
        values = ("" if value is None else f"{value:.4f}" for value in (now.kl, now.held_out_kl))
        table.add_row(arm.name, str(arm.seed), now.state, f"{now.batch}/{now.batches}" if now.batches else "", *values)
    return table


def _newest(arm: Arm, metric: str) -> float | None:
    """The last value of a metric that is logged; None: there is none."""
    file = arm.config.run_dir / "metrics.jsonl"
    lines = file.read_text().rpartition("\n")[0].splitlines() if file.is_file() else []  # the last may be half written
    values = (json.loads(line).get(metric) for line in reversed(lines))
    return next((value for value in values if value is not None), None)
