"""The run's metrics on Weights & Biases, where the config asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from common.config.run import RunConfig
from deploy.monitoring.metrics import METRICS


class WandbLog:
    """Does nothing unless `wandb.enabled`. A run that goes on from a checkpoint goes on under the same id.

    Its files lie in the run's folder, in `wandb/`.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._run: Any = None

    def __enter__(self) -> WandbLog:
        settings = self._config.wandb
        if settings.enabled:
            import wandb

            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                group=settings.group,
                mode=settings.mode,
                name=self._config.name,
                id=_run_id(self._config.run_dir),
                resume="allow",
                dir=self._config.run_dir,
                config=self._config.model_dump(mode="json"),
            )
            self._run.define_metric("*", step_metric="batch")
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._run:
            self._run.finish(exit_code=1 if kind else 0)

    def batch(self, metrics: Mapping[str, float | None]) -> None:
        """Log one rollout batch; a metric that was not measured is left out."""
        if self._run:
            measured = {name: metrics[name] for name in METRICS if metrics.get(name) is not None}
            self._run.log({name: value for name, value in measured.items() if name != "time"})


def _run_id(run_dir: Path) -> str:
    """The same id as long as the run's folder lives: names may repeat in a project, ids may not."""
    file = run_dir / "wandb_id"
    if not file.exists():
        file.write_text(uuid4().hex)
    return file.read_text()
