"""Configuration of the repair of faults while a run goes on."""

from __future__ import annotations

from pydantic import Field

from common.config.section import Section


class RecoveryConfig(Section):
    """Processes that die, hang or fail are replaced while the run goes on. See docs/reliability.md."""

    restarts: int = Field(
        10,
        ge=0,
        le=10**6,
        description="replaced processes per role and hour, after which the run ends with a checkpoint; 0: at the first",
    )
    learner_copy: bool = Field(
        True,
        description="after each rollout batch weights and optimizer of every rank are copied to another process",
    )
