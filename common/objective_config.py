"""The objective's choices as configuration: state selection, weight, target form and divergence.

    L = E_{trajectory, state} sum_b sum_{i in M(x_t^b)} w(t) D(phi^i(.|x0) || p_theta^i(.|x0^{<b}, x_t^b))

(OPDLM, arXiv 2606.06712, section 2 of the method's specification.)
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from common.section import Section


class PerBlockState(Section):
    """For each block, one of its realised rounds, drawn uniformly."""

    kind: Literal["per_block"] = "per_block"


class GlobalState(Section):
    """One round index for the whole trajectory (Algorithm 1): blocks with fewer rounds contribute nothing."""

    kind: Literal["global"] = "global"


class AllRoundsState(Section):
    """Every realised round of every block: one copy of the trajectory per round index."""

    kind: Literal["all_rounds"] = "all_rounds"


class RandomState(Section):
    """Masks drawn at a ratio t ~ U(min_ratio, max_ratio), per block or per sequence (MDLM, BD3LM)."""

    kind: Literal["random"] = "random"
    scope: Literal["block", "sequence"] = Field("block", description="one ratio per block or per sequence")
    min_ratio: float = Field(0.0, ge=0, le=1, description="least mask ratio")
    max_ratio: float = Field(1.0, ge=0, le=1, description="greatest mask ratio")
    at_least_one: bool = Field(True, description="mask one position in a block whose draw masked none")


StateSelection = Annotated[PerBlockState | GlobalState | AllRoundsState | RandomState, Field(discriminator="kind")]


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


class ObjectiveConfig(Section):
    """Which states are trained, and how the student is compared with the teacher there."""

    state: StateSelection = PerBlockState()
    weight: Literal["one", "inverse_t"] = Field("one", description="inverse_t: 1 / (masked share of the block)")
    divergence: Divergence = ForwardKL()
    topk_tail: Literal["drop", "renorm", "bucket"] = Field(
        "bucket",
        description="tokens outside the teacher's top-k: left out (may be negative), renormalised over the k, or "
        "one class of their own (a true KL, a lower bound of the full one)",
    )
    normalization: Literal["row_mean", "token_mean", "sum"] = Field(
        "row_mean", description="row_mean: mean over a row's positions, then over rows; token_mean: over all positions"
    )
    exclude_eos: bool = Field(False, description="leave the end token out of the loss, as the released code does")
