"""The run's metrics on Weights & Biases, where the config asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from common.config.run import RunConfig
from deploy.monitoring.metrics import METRICS
from deploy.monitoring.observer import Observer
from deploy.monitoring.pace import Pace


class WandbLog(Observer):
    """Does nothing unless `wandb.enabled`. A run that goes on from a checkpoint goes on under the same id.

    Its files lie in the run's folder, in `wandb/`. The step of a row is its rollout batch.
    """

    def __init__(self, config: RunConfig, first: int = 0) -> None:
        """Batches from `first` on are trained now; what an earlier part of the run logged of them is dropped."""
        self._config = config
        self._first = first
        self._run: Any = None

    def __enter__(self) -> Self:
        settings = self._config.wandb
        if settings.enabled:
            import wandb

            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                group=settings.group,
                mode=settings.mode,
                name=self._config.name,
                dir=self._config.run_dir,
                config=self._config.model_dump(mode="json"),
                **_beginning(self._config.run_dir, self._first, settings.mode),
            )
            self._run.define_metric("*", step_metric="batch")
        return self

    def end(self, error: BaseException | None) -> None:
        if self._run:
            self._run.finish(exit_code=1 if error else 0)

    def batch(self, metrics: Mapping[str, Any], pace: Pace | None = None) -> None:
        """Log one rollout batch; a metric that was not measured is left out."""
        if self._run:
            measured = {name: metrics[name] for name in METRICS if metrics.get(name) is not None}
            row = {name: value for name, value in measured.items() if name != "time"}
            self._run.log(row, step=int(metrics["batch"]), commit=True)


def _beginning(run_dir: Path, first: int, mode: str) -> dict[str, Any]:
    """How `wandb.init` begins: a new id for a run that begins anew, since names may repeat in a project and ids may
    not; else the run's own id, which the server takes back to the batch before `first`. Offline files cannot be taken
    back; the later rows of a batch count when they are synced."""
    file = run_dir / "wandb_id"
    if first == 0 or not file.exists():
        file.write_text(uuid4().hex)
        return {"id": file.read_text()}
    if mode == "offline":
        return {"id": file.read_text(), "resume": "allow"}
    return {"resume_from": f"{file.read_text()}?_step={first - 1}"}
