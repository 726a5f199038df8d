"""`opdlm replay`: an update that a run has left out, made once more, with what is not finite in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from deploy.argument_checks import a_path
from deploy.commands.console import console, say

if TYPE_CHECKING:  # torch takes seconds
    from learner.replay import Part


def register(app: typer.Typer) -> None:
    app.command("replay")(replay_update)


def replay_update(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="a folder of runs/NAME/faults, or a file in it", callback=a_path),
    ],
) -> None:
    """Repeat an update that was left out for a non-finite loss or gradient: loss, gradient norm, and which rows.

    The run that left it out has kept its trajectories and weights. No Ray and no second process is started.
    """
    from learner.replay import replay

    found = replay(file if file.is_dir() else file.parent)
    say(f"update {found.update} was left out: {found.wrong}")
    say(f"repeated: loss {found.whole.loss:.6g}, gradient norm {found.whole.grad_norm:.6g}")
    table = Table()
    for column in ("ordinal", "sample", "tokens", "positions", "loss alone", "gradient norm", "not finite"):
        table.add_column(column, justify="right")
    for row, part in found.rows:
        table.add_row(str(row.ordinal), str(row.sample), str(len(row.x0)), *_cells(part))
    console.print(table)
    if found.weights:
        say(f"weights that are not finite: {', '.join(found.weights)}")


def _cells(part: Part) -> list[str]:
    said = "" if part.finite else f"{part.bad} positions" if part.bad else "loss or gradient"
    return [str(part.positions), f"{part.loss:.6g}", f"{part.grad_norm:.6g}", said]
