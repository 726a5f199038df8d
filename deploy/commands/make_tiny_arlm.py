"""`opdlm make-tiny-arlm`: the demo's autoregressive model, trained from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.argument_checks import a_path
from deploy.commands.console import console, say
from deploy.named_files import check_writable


def register(app: typer.Typer) -> None:
    app.command("make-tiny-arlm")(make_tiny)


def make_tiny(
    out: Annotated[Path, typer.Option(help="folder to write", callback=a_path)] = Path("tiny-arlm"),
    seed: Annotated[int, typer.Option(min=0, help="seed of weights and problems")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="optimizer updates; default: as for the shipped model")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="compute threads")] = 1,
) -> None:
    """Train the demo's tiny autoregressive model from scratch, about ten minutes on one core.

    [bold]Example[/bold]

        opdlm make-tiny-arlm --out my-arlm --seed 1
    """
    check_writable("--out", out)
    from deploy.demo.tiny_arlm import make_tiny_arlm

    options: dict[str, Any] = {} if steps is None else {"steps": steps}
    metrics = make_tiny_arlm(out, seed=seed, threads=threads, **options)
    for name, value in metrics.items():
        console.print(f"{name:>16}  {value}", highlight=False)
    say(f"wrote {out}")
