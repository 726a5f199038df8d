"""`opdlm choose`: the problems that a model solves sometimes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from common.config.errors import ConfigError
from common.config.evaluation import AnswerFormat
from deploy.argument_checks import a_path, finite
from deploy.commands.console import say
from deploy.named_files import check_output


def register(app: typer.Typer) -> None:
    app.command()(choose)


def choose(
    responses: Annotated[
        Path,
        typer.Argument(help="Parquet file of opdlm respond --samples N", metavar="RESPONSES", callback=a_path),
    ],
    output: Annotated[Path, typer.Option(help="JSONL file of problems to write", callback=a_path)],
    min_rate: Annotated[
        float, typer.Option(min=0, max=1, callback=finite, help="least share of a problem's responses that is right")
    ] = 0.2,
    max_rate: Annotated[
        float, typer.Option(min=0, max=1, callback=finite, help="largest share of them that is right")
    ] = 0.8,
    answer_format: Annotated[
        AnswerFormat, typer.Option(help="where a response's final answer stands; see docs/prompts.md")
    ] = "answer_line",
    count: Annotated[int | None, typer.Option(min=1, help="the first N of them; default: all")] = None,
) -> None:
    """Choose the problems that a model solves between 20 and 80% of the time, by responses that it gave.

    Those it always or never solves say nothing about a change to it. The file has question, answer, domain and
    solve_rate, for --problems, evaluation.problems or data.prompts.

    [bold]Example[/bold]

        opdlm respond tiny --data.prompts problems.jsonl --samples 10 --output responses.parquet

        opdlm choose responses.parquet --output chosen.jsonl
    """
    if min_rate > max_rate:
        raise ConfigError(f"--min-rate: {min_rate:g} is above --max-rate {max_rate:g}; give a lower one")
    if not responses.is_file():
        raise ConfigError(f"RESPONSES: {str(responses)!r} is no file; make one with opdlm respond --samples 10")
    check_output("--output", output, ".jsonl")
    from deploy.evaluation.solve_rates import read_responses, solve_rates

    problems = solve_rates(read_responses(responses), answer_format)
    if not problems:
        raise ConfigError(f"RESPONSES: no row of {str(responses)!r} has an answer; use problems with answers")
    found = [p for p in problems if min_rate <= p.rate <= max_rate]
    chosen = found[:count]
    if not chosen:
        rates = f"{min(p.rate for p in problems):.0%} to {max(p.rate for p in problems):.0%}"
        raise ConfigError(
            f"--min-rate, --max-rate: none of {len(problems)} problems is solved in {min_rate:.0%} to {max_rate:.0%} "
            f"of {problems[0].samples} responses; they are in {rates}: use easier or harder ones, or other bounds"
        )
    rows = [{"question": p.question, "answer": p.answer, "domain": p.domain, "solve_rate": p.rate} for p in chosen]
    output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    never, always = (sum(p.rate == rate for p in problems) for rate in (0, 1))
    say(
        f"wrote {output}: {len(chosen)} of {len(problems)} problems ({never} never solved, {always} always, "
        f"{problems[0].samples} responses each)"
    )
