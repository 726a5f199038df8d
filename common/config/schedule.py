"""Everything that changes over the run, as configuration: response length, block size, confidence threshold."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from common.config.section import Section

Batch = Annotated[int, Field(ge=1)]  # number of a rollout batch, from 0: the first has block_size already


class CurriculumConfig(Section):
    """Response length limit as a function of the rollout batch, in tokens, rounded to the block size."""

    schedule: Literal["constant", "linear", "cos", "kl_gated", "entropy_gated"] = Field(
        "cos",
        description="how the limit grows; cos: 1 - cos(pi p / 2), slow at first; constant: max_tokens throughout; "
        "gated: by step_tokens each time the gate, on the divergence or on the student's entropy, is found open",
    )
    min_tokens: int = Field(100, ge=1, description="limit of the first rollout batch")
    max_tokens: int = Field(4000, ge=1, le=10**7, description="limit of the last rollout batches")
    batches: int = Field(100, ge=1, description="rollout batches until max_tokens is reached (linear, cos)")
    gate_nats: float = Field(0.2, gt=0, description="level of the gate of the gated schedules, nats per token")
    gate_on: Literal["held_out", "training"] = Field(
        "held_out",
        description="what the gate measures: the held-out prompts, at each evaluation, or the trained positions of "
        "each rollout batch",
    )
    gate_opens: Literal["above", "below"] | None = Field(
        None,
        description="the gate is open at gate_nats or above, or below it; default: above for entropy_gated, which "
        "guards against the collapse of entropy, below for kl_gated",
    )
    gate_closed: Literal["stop", "wait"] | None = Field(
        None,
        description="when the gate is found closed: back to the last limit at which it was open, for good; or wait "
        "until it opens; default: stop for entropy_gated, wait for kl_gated",
    )
    step_tokens: int = Field(100, ge=1, description="growth of the gated schedules, tokens")

    @property
    def gated(self) -> bool:
        return self.schedule in ("kl_gated", "entropy_gated")

    def gate_is_open(self, nats: float) -> bool:
        """At so many nats per token of what the gate measures."""
        opens = self.gate_opens or ("above" if self.schedule == "entropy_gated" else "below")
        return nats >= self.gate_nats if opens == "above" else nats < self.gate_nats

    @property
    def stops_when_closed(self) -> bool:
        return (self.gate_closed or ("stop" if self.schedule == "entropy_gated" else "wait")) == "stop"

    @model_validator(mode="after")
    def _ordered(self) -> CurriculumConfig:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens}); lower min_tokens"
            )
        return self


def _anchor() -> Any:
    return Field(
        False,
        description="from the first growth on, the teacher is a frozen copy of the student as it was when the blocks "
        "grew last, which reads the same masked states (BARD)",
    )


class NoGrowth(Section):
    """block_size throughout."""

    kind: Literal["none"] = "none"

    @property
    def anchor(self) -> bool:
        return False

    @property
    def later_sizes(self) -> tuple[int, ...]:
        return ()


class StepGrowth(Section):
    """From rollout batch at_batches[i] on, blocks have sizes[i] tokens; block_size before."""

    kind: Literal["steps"] = "steps"
    sizes: tuple[int, ...] = Field((8, 16), min_length=1, description="the later block sizes, growing")
    at_batches: tuple[Batch, ...] = Field((100, 200), description="the rollout batches at which they begin")
    anchor: bool = _anchor()

    @property
    def later_sizes(self) -> tuple[int, ...]:
        return self.sizes

    @model_validator(mode="after")
    def _in_pairs(self) -> StepGrowth:
        if len(self.sizes) != len(self.at_batches):
            raise ValueError(f"sizes {self.sizes} and at_batches {self.at_batches} differ in length; give pairs")
        if any(later <= earlier for earlier, later in pairwise(self.at_batches)):
            raise ValueError(f"at_batches {self.at_batches} must grow")
        return self


class PlateauGrowth(Section):
    """To the next of `sizes` when the divergence stops falling.

    That is when its mean over the last `window` rollout batches is not below (1 - min_improvement) times that of the
    `window` before, both with the present block size.
    """

    kind: Literal["plateau"] = "plateau"
    sizes: tuple[int, ...] = Field((8, 16), min_length=1, description="the later block sizes, growing")
    window: int = Field(20, ge=1, description="rollout batches of each of the two means")
    min_improvement: float = Field(0.05, ge=0, lt=1, description="relative fall of the mean that counts as progress")
    anchor: bool = _anchor()

    @property
    def later_sizes(self) -> tuple[int, ...]:
        return self.sizes


class AcceptanceGrowth(Section):
    """To the next of `sizes` when the drafts of the present block size are good, or get no better.

    That is when `eval/held_out_accepted` is at least `accepted`, or has not been above its best for `patience`
    evaluations; only those with the present block size count.
    """

    kind: Literal["acceptance"] = "acceptance"
    sizes: tuple[int, ...] = Field((8, 16), min_length=1, description="the later block sizes, growing")
    accepted: float = Field(0.7, gt=0, le=1, description="share of held-out drafts kept at which blocks grow")
    patience: int = Field(
        0, ge=0, description="blocks also grow after so many evaluations without a better share; 0: they wait for it"
    )
    anchor: bool = _anchor()

    @property
    def later_sizes(self) -> tuple[int, ...]:
        return self.sizes


BlockGrowth = Annotated[NoGrowth | StepGrowth | PlateauGrowth | AcceptanceGrowth, Field(discriminator="kind")]


class ThresholdRamp(Section):
    """The rollouts' confidence threshold: held at rollout.unmasking.threshold, then ramped linearly to `end`."""

    end: float | None = Field(None, ge=0, le=1, description="threshold after the ramp; none: no ramp")
    hold_batches: int = Field(0, ge=0, description="rollout batches before the ramp")
    ramp_batches: int = Field(100, ge=1, description="rollout batches of the ramp")
