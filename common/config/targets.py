"""What the student is compared with, as configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config.section import Section


class TeacherTarget(Section):
    """The teacher's next-token distribution on the causal prefix, as it is or reshaped.

    Reshaping: divide the logits by `temperature`, keep the `top_k` best, of these the smallest set that holds `top_p`,
    of these the tokens with at least `min_p` times the best one's probability; what is cut gets probability 0, the
    rest is renormalised.
    """

    kind: Literal["teacher"] = "teacher"
    temperature: float = Field(1.0, ge=1e-3, le=100, description="of the teacher's softmax")
    top_k: int = Field(0, ge=0, description="keep the K most likely tokens; 0: off")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the smallest set with this probability; 1: off")
    min_p: float = Field(0.0, ge=0, lt=1, description="keep tokens with this share of the best one's; 0: off")
    block_aware: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the block-aware target, in which the teacher's K best tokens have their mass by what "
        "follows in the block too (TCSM); the rest is the teacher's own; teacher.target topk",
    )
    routed_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="block-aware targets at so many of the positions, drawn at random, each with block_aware / "
        "routed_share of it: the same expectation at this share of the cost",
    )

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def reshapes(self) -> bool:
        return self.truncates or self.temperature != 1

    @model_validator(mode="after")
    def _routes_enough(self) -> TeacherTarget:
        if self.block_aware > self.routed_share:
            raise ValueError(
                f"block_aware ({self.block_aware:g}) is above routed_share ({self.routed_share:g}), so that targets "
                f"would be no distributions; raise routed_share to {self.block_aware:g} or more"
            )
        return self

    @model_validator(mode="after")
    def _is_one_of_both(self) -> TeacherTarget:
        if self.block_aware and self.reshapes:
            raise ValueError(
                f"block_aware ({self.block_aware:g}) is defined on the teacher's own distribution, which temperature, "
                "top_k, top_p and min_p reshape; turn these off, or set block_aware to 0"
            )
        return self


AS_IT_IS = TeacherTarget()


class HardTarget(Section):
    """The tokens of x0 themselves (SFT): no teacher is started."""

    kind: Literal["hard"] = "hard"


TargetChoice = Annotated[TeacherTarget | HardTarget, Field(discriminator="kind")]
