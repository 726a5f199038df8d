"""`opdlm respond`: the teacher's responses to the run's prompts, in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from common.config.file import load_config
from deploy.argument_checks import a_path, finite
from deploy.commands.config_argument import TAKES_OVERRIDES, Config
from deploy.commands.console import console, say
from deploy.evaluation.decoding_options import Temperature


def register(app: typer.Typer) -> None:
    app.command(**TAKES_OVERRIDES)(respond)


def respond(
    context: typer.Context,
    config: Config,
    output: Annotated[Path, typer.Option(help="Parquet file to write", callback=a_path)],
    samples: Annotated[int, typer.Option(min=1, help="responses per prompt")] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="response length limit; default: curriculum.max_tokens")
    ] = None,
    temperature: Temperature = 1.0,
    top_p: Annotated[
        float, typer.Option(min=1e-6, max=1, help="sample from the smallest set of this mass", callback=finite)
    ] = 1.0,
    keep: Annotated[
        Literal["all", "best"],
        typer.Option(
            help="best: of a prompt's responses one, a right one before a wrong one, then the nearest to the student; "
            "where none is right, the teacher is asked once more with the answer as a hint (BRTS)"
        ),
    ] = "all",
) -> None:
    """Generate the teacher's responses to the run's prompts, for off-policy training.

    To continue an interrupted command, repeat it.

    [bold]Examples[/bold]

        opdlm respond tiny --output runs/responses.parquet --temperature 0
        opdlm respond tiny --output runs/best.parquet --samples 2 --keep best --temperature 0.7 --top-p 0.95
        opdlm train tiny --objective.method sft --data.responses runs/responses.parquet
        opdlm train tiny --objective.method off_policy_distillation --data.responses runs/responses.parquet
    """
    settings = load_config(config, context.args)
    from deploy import respond as work

    metrics = work.respond(
        settings,
        output,
        samples=samples,
        max_new_tokens=max_new_tokens or settings.curriculum.max_tokens,
        temperature=temperature,
        top_p=top_p,
        keep=keep,
        note=lambda text: console.print(text, style="dim"),
    )
    say(
        f"wrote {output}: {metrics['responses']:,} responses of {metrics['tokens']:,} tokens, "
        f"{metrics['share_ended']:.1%} ended by themselves"
        + (f", {metrics['share_correct']:.1%} right" if keep == "best" else "")
    )
