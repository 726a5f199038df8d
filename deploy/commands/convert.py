"""`opdlm convert`: the untrained student of an autoregressive LM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from common.config.errors import ConfigError
from deploy.argument_checks import a_path, a_template
from deploy.commands.console import say
from deploy.evaluation.decoding_options import DtypeName
from deploy.named_files import check_writable, writing


def register(app: typer.Typer) -> None:
    app.command("convert")(convert_model)


def convert_model(
    model: Annotated[
        str,
        typer.Argument(
            help="folder or hub id of an autoregressive LM, or a .gguf file", metavar="MODEL", callback=a_path
        ),
    ],
    out: Annotated[Path, typer.Argument(help="folder to write", metavar="OUT", callback=a_path)],
    block_size: Annotated[int, typer.Option(min=1, help="tokens per block")] = 4,
    mask_token: Annotated[
        str, typer.Option(help="auto, new, or a token; see model.mask_token in opdlm fields")
    ] = "auto",
    end_token: Annotated[
        list[str] | None,
        typer.Option(help="a token that ends a response, repeatable; see model.end_tokens in opdlm fields"),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Jinja template, or its file, in place of the tokenizer's", callback=a_template)
    ] = None,
    context: Annotated[
        Literal["block", "causal"], typer.Option(help="what clean tokens see; see attention.context in opdlm fields")
    ] = "block",
    dtype: DtypeName = "bfloat16",
) -> None:
    """Write the untrained student of an autoregressive LM: the same weights, with a mask token and a block size.

    [bold]Example[/bold]

        opdlm convert deploy/models/tiny-arlm student --block-size 4
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"OUT: {str(out)!r} exists; choose another folder, or remove it")
    from deploy.model_checks import check_model_folder, model_errors

    check_model_folder("MODEL", model)
    check_writable("OUT", out)
    import torch

    from common.conversion import convert_folder

    with model_errors("MODEL", model), writing("OUT", out):
        conversion = convert_folder(
            model, out, block_size, mask_token, getattr(torch, dtype), end_token, chat_template, context
        )
    for note in conversion.notes:
        say(note)
    say(f"wrote {out}; it is untrained: opdlm train does that")
