"""`opdlm score`: the scores of responses that `opdlm eval --no-score` has kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.config.errors import ConfigError
from deploy.argument_checks import a_path
from deploy.named_files import check_output


def register(app: typer.Typer) -> None:
    app.command()(score)


def score(
    file: Annotated[
        Path, typer.Argument(help=".unscored.json.gz file of opdlm eval --no-score", metavar="FILE", callback=a_path)
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="the .json file of the results; default: beside FILE, by its name", callback=a_path),
    ] = None,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="run the programs that the model has written, for humaneval and mbpp")
    ] = False,
) -> None:
    """Score the responses of an evaluation, on a machine that has what scoring needs; it loads no model.

    It prints and writes what `opdlm eval` would have: results, every response, and the plot.

    [bold]Examples[/bold]

        opdlm eval runs/mine/checkpoints/final --suite ifeval --no-score --output eval.json    # on the GPU machine

        opdlm score eval.unscored.json.gz                                                      # where lm_eval is
    """
    from deploy.commands.eval import score_and_write
    from deploy.evaluation import unscored
    from deploy.evaluation.suite_options import check_scorer

    if not file.name.endswith(unscored.SUFFIX) or not file.is_file():
        raise ConfigError(f"FILE: {str(file)!r} is no {unscored.SUFFIX} file; give one of opdlm eval --no-score")
    results = output or file.with_name(file.name.removesuffix(unscored.SUFFIX) + ".json")
    check_output("--output", results, ".json")
    report, every = unscored.load(file)
    for suite in {each.suite.suite.name: each.suite.suite for each in every}.values():
        check_scorer(suite, run_code)
    score_and_write(report, every, results, None)
