"""The section of prompts and responses."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config.paths import InputPath, TemplateText
from common.config.section import Section
from common.config.values import MOST_TOKENS


class DataConfig(Section):
    """Prompts of the run, and how they are asked; held-out problems are asked in the same way."""

    prompts: InputPath = Field(
        description="JSON, JSONL, CSV or Parquet file (also .gz or .zst), a folder of them or of save_to_disk, or the "
        "hub id of a data set; relative paths begin at the current folder, and what is not there is looked for among "
        "the project's own files"
    )
    split: str | None = Field(None, description="which split, where the folder or data set has several; all: every one")
    subset: str | None = Field(None, description="which subset (configuration), where a data set has several")
    question_field: str = Field("question", description="field of a record that holds the prompt")
    domain_field: str = Field("domain", description="field that holds the domain, where known")
    answer_field: str = Field("answer", description="field that holds the answer; used in evaluation only")
    assistant_turn: Literal["auto", "start", "response"] = Field(
        "auto",
        description="what an assistant turn at the end of a row's messages is: the start of the response, which is "
        "kept, or a whole response, which is left out; auto: a start if it is marked so or ends openly",
    )
    templates: dict[str, str] = Field(
        {}, description="what the user says by domain, with {question} in it; `default` is for all other domains"
    )
    system: str | None = Field(None, description="system turn of prompts that bring none")
    chat_template: TemplateText | None = Field(
        None,
        description="Jinja template, or its file, in place of the tokenizer's; a tokenizer without one (a base model) "
        "is asked with the user's text alone",
    )
    enable_thinking: bool = Field(False, description="passed to the chat template")
    drop_duplicates: bool = Field(False, description="drop exact copies of earlier prompts; they are counted anyway")
    max_prompt_tokens: int = Field(2000, ge=1, le=MOST_TOKENS, description="longer prompts are dropped and counted")
    epochs: int = Field(1, ge=1, le=10**4, description="passes over the prompts, each in an order of its own")
    limit: int | None = Field(None, ge=1, description="use only the first N prompts of the seeded order")
    domain_max_tokens: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="response length cap by domain, tokens"
    )
    responses: InputPath | None = Field(
        None,
        description="JSON, JSONL or Parquet file, or a folder of them, with offline responses to the questions "
        "(`opdlm respond` makes one); for objective.source offline and mixture",
    )
    trajectories: InputPath | None = Field(
        None,
        description="folder of what pipeline.spool wrote in an earlier run (runs/NAME/spool), or one of its files; for "
        "objective.source replay",
    )
    response_field: str = Field("response", description="field of a record of data.responses that holds the response")

    @model_validator(mode="after")
    def _templates_hold_the_question(self) -> DataConfig:
        for domain, template in self.templates.items():
            if "{question}" not in template:
                raise ValueError(
                    f"templates.{domain} {template!r} has no {{question}}, so no prompt would hold its question; put "
                    "{question} where it belongs"
                )
        return self
