"""The command line `opdlm`: registers the commands and reports how they end.

Heavy libraries are imported inside the commands, so that `--help` and `--dry-run` answer at once.
"""

from __future__ import annotations

import os
import sys

import typer
from rich.console import Console
from rich.text import Text

from common.config.errors import ConfigError
from deploy.commands import (
    ablate,
    convert,
    dashboard,
    eval,
    fields,
    generate,
    jobs,
    lm_eval,
    make_tiny_arlm,
    respond,
    train,
)
from deploy.errors import RunError, Stopped

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn an autoregressive LM into a block-diffusion LM by on-policy distillation (OPDLM).",
    epilog="Begin with [bold]opdlm train tiny[/bold]: the whole loop on this machine, no GPU needed.",
)
# in the order of the help
for command in (
    train, eval, generate, lm_eval, convert, fields, respond, ablate, dashboard, jobs, make_tiny_arlm,
):  # fmt: skip
    command.register(app)


def main() -> None:
    """Run the command line; bad input ends with status 2 and no traceback, a failed run with status 1."""
    # progress bars of single files say nothing here; a user's own setting wins
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(prog_name="opdlm")
    except ConfigError as error:
        _report("error: ", error)
        sys.exit(2)
    except Stopped as stopped:
        _report("stopped: ", stopped)
        sys.exit(stopped.exit_status)
    except RunError as error:
        _report("run failed: ", error)
        sys.exit(1)


def _report(label: str, error: Exception) -> None:
    text = Text.assemble((label, "bold red"), str(error))
    Console(stderr=True).print(text, soft_wrap=True)


if __name__ == "__main__":
    main()
