"""The control loop's section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from common.config.paths import OutputUrl
from common.config.section import OPERATION, Section
from common.config.values import LONGEST_WAIT_S


class PipelineConfig(Section):
    """The control loop."""

    staleness: Literal[0, 1] = Field(
        0, description="0: strictly on-policy; 1: rollouts of the next batch overlap training on this one"
    )
    max_batches: int | None = Field(None, ge=1, description="stop after N rollout batches; default: all prompts")
    stage_timeout_s: float = Field(
        1800.0, gt=0, le=LONGEST_WAIT_S, description="deadline of every remote wait", json_schema_extra=OPERATION
    )
    start_timeout_s: float = Field(
        900.0,
        gt=0,
        le=LONGEST_WAIT_S,
        description="deadline for the actors to load their models",
        json_schema_extra=OPERATION,
    )
    checkpoint_every_minutes: float = Field(
        10.0,
        ge=0,
        le=LONGEST_WAIT_S / 60,
        description="a checkpoint after the batch in which so many minutes have passed since the last; 0: none",
        json_schema_extra=OPERATION,
    )
    checkpoint_every_batches: int = Field(
        0, ge=0, description="also one after every N batches; 0: none", json_schema_extra=OPERATION
    )
    keep_checkpoints: int = Field(
        2, ge=1, description="older checkpoints of batches are deleted", json_schema_extra=OPERATION
    )
    copy_checkpoints_to: OutputUrl | None = Field(
        None,
        description="folder or URL (s3://, gs://, fsspec+PROTOCOL://) to which finished checkpoints are copied",
        json_schema_extra=OPERATION,
    )
    spool: bool = Field(
        False,
        description="write every trained record batch as Arrow IPC to the run's folder",
        json_schema_extra=OPERATION,
    )

    @property
    def checkpoints_while_training(self) -> bool:
        return bool(self.checkpoint_every_minutes or self.checkpoint_every_batches)
