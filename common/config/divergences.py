"""Divergences, of all positions and of those outside the trust region, as configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from common.config.section import Section


class ForwardKL(Section):
    """D = KL(phi || p)."""

    kind: Literal["forward_kl"] = "forward_kl"


class ReverseKL(Section):
    """D = KL(p || phi)."""

    kind: Literal["reverse_kl"] = "reverse_kl"


class MixedKL(Section):
    """D = (1 - alpha) KL(phi || p) + alpha KL(p || phi)."""

    kind: Literal["mixed_kl"] = "mixed_kl"
    alpha: float = Field(0.5, ge=0, le=1, description="share of the reverse KL")


class JensenShannon(Section):
    """D = alpha KL(phi || m) + (1 - alpha) KL(p || m) with m = alpha phi + (1 - alpha) p."""

    kind: Literal["jensen_shannon"] = "jensen_shannon"
    alpha: float = Field(0.5, gt=0, lt=1, description="weight of phi in m; near 0 like forward, near 1 like reverse KL")


Divergence = Annotated[ForwardKL | ReverseKL | MixedKL | JensenShannon, Field(discriminator="kind")]


class NoOutliers(Section):
    """Every position has the divergence."""

    kind: Literal["none"] = "none"


class ForwardKLOutliers(Section):
    """Outside the trust region D is the forward KL over the teacher's best tokens, with objective.topk_tail (TrOPD)."""

    kind: Literal["forward_kl"] = "forward_kl"
    top_k: int = Field(64, ge=1, description="how many of the teacher's best tokens")


class LeftOutOutliers(Section):
    """Outside the trust region D is 0; such positions count in the normalisation all the same."""

    kind: Literal["left_out"] = "left_out"


Outliers = Annotated[NoOutliers | ForwardKLOutliers | LeftOutOutliers, Field(discriminator="kind")]
