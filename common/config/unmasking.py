"""The rules that say which masked positions a step of decoding reveals."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config.section import Section


class StaticUnmasking(Section):
    """Reveal the K = block_size / steps_per_block most confident positions of a block per step."""

    rule: Literal["static"] = "static"
    steps_per_block: int | None = Field(None, ge=1, description="default: block_size, one token a step")


class DynamicUnmasking(Section):
    """Reveal every position with confidence above `threshold`, and at least the `min_tokens` most confident.

    With `revise` a token that the present block has revealed gives way to another one that the student then finds more
    probable than that, which only makes sense for a student that was trained at unmasked positions too (BARD).
    """

    rule: Literal["dynamic"] = "dynamic"
    threshold: float = Field(0.9, ge=0, le=1, description="confidence (probability) above which a token is revealed")
    min_tokens: int = Field(1, ge=1, description="tokens revealed per step at least")
    revise: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="probability above which another token replaces one that the block has revealed; not for rollouts; "
        "0: never",
    )


class SequentialUnmasking(Section):
    """Reveal the leftmost `tokens_per_step` masked positions."""

    rule: Literal["sequential"] = "sequential"
    tokens_per_step: int = Field(1, ge=1, description="tokens revealed per step")


class EntropyBoundUnmasking(Section):
    """Reveal the lowest-entropy positions while their cumulated entropy stays under `bound_nats`, at least one."""

    rule: Literal["entropy_bound"] = "entropy_bound"
    bound_nats: float = Field(0.1, ge=0, description="largest cumulated entropy of one step's tokens, nats")


class AdaptiveUnmasking(Section):
    """Reveal every position whose confidence reaches a threshold that moves with the confidences seen (BACD).

    In a block's first round it is the highest confidence, later the mean confidence of the tokens that the block has
    revealed, always within the bounds; at least the most confident position is revealed.
    """

    rule: Literal["adaptive"] = "adaptive"
    lower: float = Field(0.6, ge=0, le=1, description="lower bound of the threshold")
    upper: float = Field(0.9, ge=0, le=1, description="upper bound of the threshold")

    @model_validator(mode="after")
    def _ordered(self) -> AdaptiveUnmasking:
        if self.lower > self.upper:
            raise ValueError(f"lower ({self.lower}) is above upper ({self.upper}); lower lower")
        return self


class SpeculativeUnmasking(Section):
    """Draft the rest of a block, verify it with a causal reading, keep the prefix that agrees and the verifier's token
    behind it: the text is that reading's own. The student's own reading needs attention.context causal."""

    rule: Literal["speculative"] = "speculative"
    verify: Literal["self", "base"] = Field(
        "self", description="who verifies: the student, read causally; base: the original, a model of its own"
    )
    draft_rounds: int = Field(1, ge=1, description="steps of a draft; all but the last reveal by `threshold`")
    threshold: float = Field(
        0.9, ge=0, le=1, description="confidence above which a step before the last of a draft reveals a token"
    )


Unmasking = Annotated[
    StaticUnmasking
    | DynamicUnmasking
    | SequentialUnmasking
    | EntropyBoundUnmasking
    | AdaptiveUnmasking
    | SpeculativeUnmasking,
    Field(discriminator="rule"),
]
