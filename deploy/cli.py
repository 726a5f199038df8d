"""The command line `opdlm`: registers the commands and reports how they end.

Heavy libraries are imported inside the commands, so that `--help` and `--dry-run` answer at once.
"""

from __future__ import annotations

import errno
import io
import os
import sys

import typer
from rich.console import Console
from rich.text import Text

from common.config.errors import ConfigError
from common.prompts import PromptError
from deploy.commands import (
    ablate,
    choose,
    convert,
    dashboard,
    eval,
    export,
    fields,
    generate,
    jobs,
    lm_eval,
    make_tiny_arlm,
    merge,
    prompts,
    replay,
    respond,
    score,
    serve,
    train,
)
from deploy.errors import RunError, Stopped

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

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
    train, eval, score, generate, serve, lm_eval, convert, merge, export, fields, prompts, respond, choose, replay,
    ablate, dashboard, jobs, make_tiny_arlm,
):  # fmt: skip
    command.register(app)


def main() -> None:
    """Run the command line and end with its status.

    Errors that a user can correct end with status 2 and one sentence: bad input, and files that cannot be read or
    written. A failed run ends with status 1 and its cause, a stopped one with 128 + the signal. Any other error is a
    fault of this program and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show must not end a command
            stream.reconfigure(errors="backslashreplace")
    # progress bars of single files say nothing here; a user's own setting wins
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(prog_name="opdlm")
    except (ConfigError, PromptError) as error:
        _report("error: ", error)
        sys.exit(2)
    except OSError as error:
        if error.filename is None and error.errno not in _FULL_DISK:
            raise  # no file of the user's
        _report("error: ", _file_error(error))
        sys.exit(2)
    except Stopped as stopped:
        _report("stopped: ", stopped)
        sys.exit(stopped.exit_status)
    except RunError as error:
        _report("run failed: ", error)
        sys.exit(1)


def _file_error(error: OSError) -> str:
    if error.errno in _FULL_DISK:
        place = f"{error.filename!r}: " if error.filename else ""
        return f"{place}{error.strerror}; free space, or write to another disk"
    return f"{error.filename!r}: {error.strerror}; name another file or folder, or change its permissions"


def _report(label: str, error: Exception | str) -> None:
    text = Text.assemble((label, "bold red"), str(error))
    Console(stderr=True).print(text, soft_wrap=True)


if __name__ == "__main__":
    main()
