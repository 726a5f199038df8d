"""Configuration of Weights & Biases, beside TensorBoard."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from common.config.section import Section


class WandbConfig(Section):
    """The run's metrics on a Weights & Biases server. Needs the extra `wandb`, and online `wandb login`."""

    enabled: bool = Field(False, description="log to Weights & Biases too")
    mode: Literal["online", "offline"] = Field(
        "online", description="offline: write to the run's folder only; `wandb sync` sends it later"
    )
    project: str = Field("opdlm", min_length=1, description="project of the run")
    entity: str | None = Field(None, description="user or team; default: the account's own")
    group: str | None = Field(None, description="runs of one group are shown together")
