"""What is checked of the arguments of all commands: paths are filled in as in a config, and numbers mean something.

The shell leaves `--output=~/x` and what is quoted to the program.
"""

from __future__ import annotations

import math
from typing import Any

import typer

from common.config.errors import ConfigError
from common.config.paths import expanded, template_text
from common.config.values import far_from_zero


def a_path(param: typer.CallbackParam, value: Any) -> Any:
    """A path, as text or Path, with `~` and environment variables filled in."""
    if value is None:
        return None
    try:
        return type(value)(expanded(str(value)))
    except ValueError as error:
        raise ConfigError(f"{_name(param)}: {error}") from error


def a_template(param: typer.CallbackParam, value: str | None) -> str | None:
    """The text of a chat template, given itself or as its file."""
    try:
        return None if value is None else template_text(value)
    except ValueError as error:
        raise ConfigError(f"{_name(param)}: {error}") from error


def finite(param: typer.CallbackParam, value: Any) -> Any:
    """A number or a list of them: neither infinite nor NaN, which pass every limit."""
    for number in value if isinstance(value, list) else [value]:
        if number is not None and not math.isfinite(number):
            raise ConfigError(f"{_name(param)}: {number} is no number to work with; give a finite one")
    return value


def temperature(param: typer.CallbackParam, value: float) -> float:
    """A temperature that logits can be divided by, or 0."""
    try:
        return far_from_zero(float(finite(param, value)))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{_name(param)}: {error}") from error


def _name(param: typer.CallbackParam) -> str:
    option: str = param.opts[-1]
    return option if option.startswith("-") else str(param.metavar or option).upper()
