"""The section of evaluation during training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from common.config.paths import InputPath
from common.config.section import OPERATION, Section
from common.config.values import MOST_TOKENS

AnswerFormat = Literal["answer_line", "boxed", "last_number"]  # see common/answers.py


class EvaluationConfig(Section):
    """Held-out problems with a checkable answer, and held-out prompts; only what is held out changes the training."""

    problems: InputPath | None = Field(None, description="file as data.prompts, with answers; none: no problems")
    split: str | None = Field(None, description="as data.split, of the problems", json_schema_extra=OPERATION)
    subset: str | None = Field(None, description="as data.subset, of the problems", json_schema_extra=OPERATION)
    count: int = Field(200, ge=1, description="first N problems of the file", json_schema_extra=OPERATION)
    max_new_tokens: int = Field(512, ge=1, description="response length limit, tokens", json_schema_extra=OPERATION)
    threshold: float = Field(
        0.9, ge=0, le=1, description="confidence threshold of the dynamic evaluation", json_schema_extra=OPERATION
    )
    every_batches: int = Field(
        0,
        ge=0,
        description="also evaluate after every N batches of training; 0: only before and after",
        json_schema_extra=OPERATION,
    )
    teacher: bool = Field(
        True, description="evaluate the greedy autoregressive teacher too", json_schema_extra=OPERATION
    )
    answer_format: AnswerFormat = Field(
        "answer_line",
        description="what counts as a response's answer: what stands after 'Answer:', the last \\boxed{}, "
        "or the last number",
        json_schema_extra=OPERATION,
    )
    held_out_prompts: int = Field(
        0,
        ge=0,
        le=10**6,
        description="prompts of data.prompts that are never trained on, for the held-out KL; 0: no held-out KL",
    )
    held_out_tokens: int = Field(
        256,
        ge=1,
        le=MOST_TOKENS,
        description="length limit of the teacher's greedy responses to the held-out prompts, tokens",
        json_schema_extra=OPERATION,
    )
