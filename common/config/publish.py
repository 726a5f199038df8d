"""The section of how weights travel."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from common.config.section import Section


class PublishConfig(Section):
    """How new weights travel to the rollout actors."""

    transport: Literal["auto", "object_store", "broadcast"] = Field(
        "object_store",
        description="object_store: through Ray's shared memory; broadcast: NCCL between whole GPUs, gloo between CPUs, "
        "with one more copy of the weights in learner-0; auto: broadcast where learner and rollouts have whole GPUs",
    )
    bucket_mib: int = Field(256, ge=1, le=2**20, description="largest gathered buffer, MiB; one tensor may exceed it")
