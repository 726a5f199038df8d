"""`opdlm merge`: an adapter and its base model as one plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.config.errors import ConfigError
from deploy.argument_checks import a_path
from deploy.commands.console import say
from deploy.evaluation.decoding_options import DtypeName
from deploy.named_files import check_writable, writing


def register(app: typer.Typer) -> None:
    app.command("merge")(merge_adapter)


def merge_adapter(
    adapter: Annotated[
        str, typer.Argument(help="checkpoint of a run with adapter.rank", metavar="ADAPTER", callback=a_path)
    ],
    out: Annotated[Path, typer.Argument(help="folder to write", metavar="OUT", callback=a_path)],
    dtype: DtypeName = "bfloat16",
) -> None:
    """Write an adapter and its base model as one plain model, which needs neither. An adapter with a gate has none.

    [bold]Example[/bold]

        opdlm merge runs/mine/checkpoints/final merged
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"OUT: {str(out)!r} exists; choose another folder, or remove it")
    from deploy.model_checks import check_student_folder, model_errors

    check_student_folder("ADAPTER", adapter)
    check_writable("OUT", out)
    import torch

    from common.conversion import merge_folder

    with model_errors("ADAPTER", adapter), writing("OUT", out):
        merge_folder(adapter, out, getattr(torch, dtype))
    say(f"wrote {out}")
