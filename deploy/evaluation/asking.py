"""How a student is asked by `eval` and `generate`: as it was trained, unless an option says otherwise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from common.chat import has_thinking_switch
from common.config.errors import ConfigError
from common.conversations import DEFAULT_TEMPLATE, QUESTION
from deploy.model_checks import model_json

Thinking = Annotated[
    bool | None,
    typer.Option(
        "--thinking/--no-thinking",
        help="whether the model thinks before it answers, if its chat template can turn that on and off; default: "
        "as in training",
        show_default=False,
    ),
]
System = Annotated[str | None, typer.Option(help="system message for prompts that have none; default: as in training")]
Template = Annotated[str | None, typer.Option(help="user message, with {question} where the question belongs")]
Split = Annotated[str | None, typer.Option(help="which split, if the folder or data set has several")]
Subset = Annotated[str | None, typer.Option(help="which subset (configuration), if the data set has several")]


_FIELDS_WITH_OPTION = re.compile(r"\bdata\.(question_field|answer_field|split|subset|system)\b")


def with_options_named(message: str) -> str:
    """A message about the data section of a config, for commands whose options stand for its fields."""
    return _FIELDS_WITH_OPTION.sub(lambda field: "--" + field[1].replace("_", "-"), message)


def check_thinking(field: str, thinking: bool | None, tokenizer: Any) -> None:
    """Refuse to turn thinking on or off where that changes nothing.

    Raises:
        ConfigError: the chat template has no switch for it.
    """
    if thinking is not None and not has_thinking_switch(tokenizer):
        raise ConfigError(
            f"{field}: the model's chat template has no switch for thinking (enable_thinking or thinking); leave it out"
        )


def asked_like_training(
    model: str, thinking: bool | None, system: str | None = None, template: str | None = None
) -> dict[str, Any]:
    """Fields of a data section: those that the checkpoint records (see common/chat.py), then those of the options.

    Raises:
        ConfigError: the template has no place for the question.
    """
    if template is not None and QUESTION not in template:
        raise ConfigError(f"--template: {template!r} has no {QUESTION}; put it where the question belongs")
    recorded = model_json("MODEL", model).get("opdlm") if Path(model).is_dir() else None
    given = {
        "enable_thinking": thinking,
        "system": system,
        "templates": None if template is None else {DEFAULT_TEMPLATE: template},
    }
    return {**(recorded or {}), **{name: value for name, value in given.items() if value is not None}}
