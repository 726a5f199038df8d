"""`opdlm eval`: exact match and decoding speed of a student, swept over decoding settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from common.config.errors import ConfigError
from common.config.run import AnswerFormat, DataConfig
from deploy.argument_checks import a_path, finite
from deploy.commands.console import console, say
from deploy.evaluation.asking import (
    Split,
    Subset,
    System,
    Template,
    Thinking,
    asked_like_training,
    check_thinking,
    with_options_named,
)
from deploy.evaluation.decoding_options import (
    DEFAULT_THRESHOLD,
    DtypeName,
    RuleName,
    Student,
    Temperature,
    response_limit,
)
from deploy.named_files import check_output, writing

DEFAULT_MAX_TOKENS = 512


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    model: Student,
    problems: Annotated[
        str,
        typer.Option(
            help="JSON, JSONL, CSV or Parquet with a question and an answer a row, a folder of them, or the hub id of "
            "a data set",
            callback=a_path,
        ),
    ],
    split: Split = None,
    subset: Subset = None,
    question_field: Annotated[str, typer.Option(help="field of a row that holds the question")] = "question",
    answer_field: Annotated[str, typer.Option(help="field of a row that holds the answer")] = "answer",
    rule: Annotated[
        list[RuleName] | None,
        typer.Option(
            metavar="RULE",
            help="which masked tokens a step reveals, repeatable: static (the most confident), sequential (the "
            "leftmost), dynamic (all above the threshold; the default) or entropy_bound (the most certain, up to a "
            "total entropy)",
        ),
    ] = None,
    threshold: Annotated[
        list[float] | None,
        typer.Option(
            callback=finite, min=0, max=1, help="confidence threshold of the dynamic rule, repeatable; default: 0.9"
        ),
    ] = None,
    tokens_per_step: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="tokens revealed per step under the static and sequential rules, repeatable; default: 1"
        ),
    ] = None,
    bound: Annotated[
        list[float] | None,
        typer.Option(
            callback=finite,
            min=0,
            help="most entropy, in nats, of all tokens of one step under the entropy_bound rule, repeatable; "
            "default: 0.1",
        ),
    ] = None,
    block_size: Annotated[
        list[int] | None, typer.Option(min=1, help="tokens per block, repeatable; default: the model's own")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="folder of the autoregressive teacher, which is evaluated too", callback=a_path),
    ] = None,
    temperature: Temperature = 0.0,
    seeds: Annotated[
        int, typer.Option(min=1, help="runs per setting, each with its own seed, if the temperature is above 0")
    ] = 1,
    count: Annotated[int, typer.Option(min=1, help="evaluate the first N problems")] = 200,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"response length limit, tokens; default: {DEFAULT_MAX_TOKENS}, or less where the positions end"
        ),
    ] = None,
    answer_format: Annotated[
        AnswerFormat,
        typer.Option(
            help="what is read as a response's answer: what stands after 'Answer:', the last \\boxed{}, or the last "
            "number"
        ),
    ] = "answer_line",
    output: Annotated[
        Path | None,
        typer.Option(
            help="write the results to this .json file, and the plot to a .png of the same name", callback=a_path
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="write the plot of accuracy against tokens per step to this .png file", callback=a_path),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="sequences decoded at the same time")] = 64,
    dtype: DtypeName = "float32",
    thinking: Thinking = None,
    system: System = None,
    template: Template = None,
    autoregressive: Annotated[
        bool, typer.Option("--autoregressive", help="evaluate MODEL as an autoregressive LM, such as the teacher")
    ] = False,
) -> None:
    """Measure accuracy and tokens per step on problems with a checkable answer, for one or more decoding settings.

    Options marked as repeatable may be given several times. Then all combinations are evaluated: each rule, with each
    value of its own parameter, at each block size.

    [bold]Examples[/bold]

        opdlm eval runs/tiny/checkpoints/final --problems deploy/data/word_problems_heldout.jsonl --rule static

        opdlm eval runs/tiny/checkpoints/final --problems deploy/data/word_problems_heldout.jsonl
        --rule static --rule dynamic --threshold 0.8 --threshold 0.9 --block-size 4 --block-size 8
        --teacher deploy/models/tiny-arlm --max-new-tokens 72 --output eval.json
    """
    student_only = {
        "--rule": rule,
        "--threshold": threshold,
        "--tokens-per-step": tokens_per_step,
        "--bound": bound,
        "--block-size": block_size,
        "--teacher": teacher,
    }
    rules = [str(r) for r in rule or [RuleName.dynamic]]
    _check_options(rules, student_only, autoregressive, output, plot)
    from deploy.model_checks import check_model_folder, check_student_folder, model_errors, model_json
    from deploy.preflight import read_problems

    if autoregressive:
        check_model_folder("MODEL", model)
    else:
        check_student_folder("MODEL", model)
    if teacher:
        check_model_folder("--teacher", teacher)
    from common.chat import asked_with
    from common.student import load_config, load_tokenizer

    with model_errors("MODEL", model):
        tokenizer, positions = load_tokenizer(model), load_config(model).max_position_embeddings
    check_thinking("--thinking", thinking, tokenizer)
    data = DataConfig(
        prompts=problems,
        split=split,
        subset=subset,
        question_field=question_field,
        answer_field=answer_field,
        **asked_like_training(model, thinking, system, template),
    )
    try:
        found = read_problems("--problems", data, tokenizer, count)
    except ConfigError as error:
        raise ConfigError(with_options_named(str(error))) from error
    for note in (*found.notes, *(f"{number} problems left out: {reason}" for reason, number in found.dropped.items())):
        say(f"--problems: {with_options_named(note)}")
    held_out = found.prompts
    sizes = block_size or ([int(model_json("MODEL", model)["block_size"])] if not autoregressive else [1])
    longest = max(len(problem.ids) for problem in held_out)
    limit = response_limit(
        max_new_tokens, DEFAULT_MAX_TOKENS, longest=longest, positions=positions, block_size=max(sizes)
    )

    from deploy.evaluation.sweep import Row, Sweep, settings_of

    settings = settings_of(rules, threshold or [DEFAULT_THRESHOLD], tokens_per_step or [1], bound or [0.1], sizes)
    sweep = Sweep(held_out, limit, temperature, seeds, slots, dtype, answer_format)
    rows: list[Row] = []
    total = 1 if autoregressive else len(settings) + bool(teacher)
    with console.status("loading the model") as status:
        if autoregressive:
            rows.append(sweep.teacher_row("MODEL", model))
        else:
            for row in sweep.student_rows("MODEL", model, settings):
                rows.append(row)
                status.update(f"{len(rows)} of {total} settings")
            if teacher:
                rows.append(sweep.teacher_row("--teacher", teacher, model_json("MODEL", model).get("end_token_ids")))
    _show(rows)
    report = sweep.report(problems, rows) | {"asked": asked_with(data), "left_out": found.dropped}
    _write(report, rows, output, plot, f"{model} on {Path(problems).stem}")


def _check_options(
    rules: list[str], student_only: dict[str, Any], autoregressive: bool, output: Path | None, plot: Path | None
) -> None:
    """Refuse options that would have no effect, or files that cannot be written, before a model is loaded."""
    if autoregressive and (given := [name for name, value in student_only.items() if value]):
        raise ConfigError(f"{given[0]}: has no meaning with --autoregressive; leave one of them out")
    needs = {"--threshold": {"dynamic"}, "--tokens-per-step": {"static", "sequential"}, "--bound": {"entropy_bound"}}
    for name, users in needs.items():
        if student_only[name] and not users & set(rules):
            raise ConfigError(f"{name}: no rule of this sweep uses it; add --rule {' or '.join(sorted(users))}")
    for name, path, suffix in (("--output", output, ".json"), ("--plot", plot, ".png")):
        if path:
            check_output(name, path, suffix)


def _show(rows: list[Any]) -> None:
    """A list of metrics for a single run, else the table."""
    from deploy.evaluation.sweep_report import table

    if len(rows) == 1 and len(rows[0].runs) == 1:
        for name, value in rows[0].mean.items():
            console.print(f"{name:>32}  {value:.4g}", highlight=False)
    else:
        console.print(table(rows, console.width))


def _write(report: dict[str, Any], rows: list[Any], output: Path | None, plot: Path | None, title: str) -> None:
    from deploy.evaluation import sweep_report

    if output:
        with writing("--output", output):
            output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        say(f"results: {output}")
    if image := plot or (output.with_suffix(".png") if output else None):
        with writing("--plot", image):
            sweep_report.plot(rows, image, title)
        say(f"plot: {image}")
