"""The CONFIG of a command, and the overrides behind it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Config = Annotated[str, typer.Argument(help="YAML file, or the name of a preset", metavar="CONFIG")]
# what a command is registered with that passes all options it does not know on to load_config
TAKES_OVERRIDES: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "options_metavar": "[OPTIONS] [--FIELD VALUE]...",
}
