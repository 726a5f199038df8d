"""The rollout actors' section."""

from __future__ import annotations

from pydantic import Field, model_validator

from common.config.resources import Resources
from common.config.schedule import ThresholdRamp
from common.config.section import OPERATION, Section
from common.config.unmasking import DynamicUnmasking, SpeculativeUnmasking, Unmasking
from common.config.values import MOST_PROCESSES, Dtype, Temperature


class RolloutConfig(Section):
    """The pool of rollout actors and how they decode."""

    actors: int = Field(2, ge=1, le=MOST_PROCESSES, description="processes in the pool", json_schema_extra=OPERATION)
    slots: int = Field(
        64, ge=1, le=2**16, description="sequences decoded at the same time in one actor", json_schema_extra=OPERATION
    )
    prompts_per_batch: int = Field(128, ge=1, le=10**6, description="prompts of one rollout batch, over all actors")
    samples_per_prompt: int = Field(1, ge=1, le=10**4, description="trajectories per prompt")
    stream_rows: int = Field(
        8, ge=1, le=10**6, description="finished trajectories per record batch sent on", json_schema_extra=OPERATION
    )
    unmasking: Unmasking = Field(DynamicUnmasking(), description="which masked positions a step reveals")
    threshold_ramp: ThresholdRamp = ThresholdRamp()
    temperature: Temperature = Field(1.0, description="of the sampling softmax; 0: argmax")
    top_k: int = Field(0, ge=0, description="sample from the K most likely tokens only; 0: off")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the smallest set with this probability; 1: off")
    max_batched_tokens: int = Field(
        16384,
        ge=1,
        description="prompt tokens of one prefill, padding included; a longer prompt is one of its own",
        json_schema_extra=OPERATION,
    )
    dtype: Dtype = Field("bfloat16", description="of weights and activations")
    compile: bool = Field(
        True,
        description="on GPUs, compile what has no kernel of its own: half a minute at first",
        json_schema_extra=OPERATION,
    )
    cuda_graphs: bool = Field(True, description="on GPUs, replay passes as CUDA graphs", json_schema_extra=OPERATION)
    resources: Resources = Field(Resources(), json_schema_extra=OPERATION)

    @model_validator(mode="after")
    def _rounds_are_the_students(self) -> RolloutConfig:
        if isinstance(self.unmasking, SpeculativeUnmasking):
            raise ValueError(
                "unmasking.rule 'speculative' is for generation and evaluation: it writes the text of the causal "
                "reading, not the student's own; choose another rule for rollouts"
            )
        if isinstance(self.unmasking, DynamicUnmasking) and self.unmasking.revise:
            raise ValueError(
                f"unmasking.revise ({self.unmasking.revise:g}) is for generation and evaluation: a token that changes "
                "has no round from which states could be selected; set it to 0 for rollouts"
            )
        return self

    @model_validator(mode="after")
    def _ramp_has_a_threshold(self) -> RolloutConfig:
        if self.threshold_ramp.end is not None and not isinstance(self.unmasking, DynamicUnmasking):
            raise ValueError(
                f"threshold_ramp.end ({self.threshold_ramp.end}) ramps the threshold of unmasking.rule dynamic, but "
                f"the rule is {self.unmasking.rule!r}; set threshold_ramp.end to null or the rule to dynamic"
            )
        return self
