"""The section of the adapter: low-rank updates in place of all weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from common.config.section import Section

Gate = Literal["none", "mask"]
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OF_ATTENTION: tuple[Projection, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
PROJECTIONS: tuple[Projection, ...] = (*OF_ATTENTION, "gate_proj", "up_proj", "down_proj")


class AdapterConfig(Section):
    """LoRA (2106.09685): W x + (alpha / rank) B A x, of which A and B are trained and W stays as it is."""

    rank: int = Field(0, ge=0, le=2**14, description="rows of A; 0: no adapter, all weights are trained")
    alpha: float = Field(32.0, gt=0, le=1e6, description="the update is scaled by alpha / rank")
    targets: tuple[Projection, ...] = Field(
        PROJECTIONS, min_length=1, description="linear layers of every decoder layer that have an update"
    )
    gate: Gate = Field(
        "none",
        description="mask: the update acts at mask positions only, so that what reads clean tokens is the ARLM "
        "unchanged; none: at all positions, and it can be merged into the weights",
    )

    @field_validator("targets")
    @classmethod
    def _once_each(cls, targets: tuple[Projection, ...]) -> tuple[Projection, ...]:
        for target in targets:
            if targets.count(target) > 1:
                raise ValueError(f"{target} is named twice; name it once")
        return targets

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def gated(self) -> bool:
        return self.rank > 0 and self.gate == "mask"
