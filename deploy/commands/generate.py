"""`opdlm generate`: answers to one prompt or to a file of prompts, and how they were unmasked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from common.config.errors import ConfigError
from common.prompts import PromptError, read_records
from deploy.argument_checks import a_path
from deploy.commands.console import console, say
from deploy.evaluation.decoding_options import (
    DEFAULT_THRESHOLD,
    BlockSize,
    DtypeName,
    Rule,
    RuleName,
    Student,
    Temperature,
    Threshold,
    response_limit,
    unmasking_of,
)
from deploy.named_files import check_output, writing

DEFAULT_MAX_TOKENS = 256


def register(app: typer.Typer) -> None:
    app.command()(generate)


def generate(
    model: Student,
    prompt: Annotated[str | None, typer.Argument(help="the prompt; or use --file", metavar="PROMPT")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help=".txt with one prompt a line, or .jsonl, .json, .parquet", callback=a_path),
    ] = None,
    question_field: Annotated[str, typer.Option(help="field of a record in --file that holds the prompt")] = "question",
    output: Annotated[
        Path | None,
        typer.Option(help="write a .jsonl: the record of every prompt, its response and its counts", callback=a_path),
    ] = None,
    show_steps: Annotated[
        bool, typer.Option("--show-steps", help="show how the text was unmasked, round by round")
    ] = False,
    rule: Rule = RuleName.dynamic,
    threshold: Threshold = DEFAULT_THRESHOLD,
    block_size: BlockSize = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"response length limit, tokens; default: {DEFAULT_MAX_TOKENS}, or less where the positions end"
        ),
    ] = None,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="of the sampling")] = 0,
    slots: Annotated[int, typer.Option(min=1, help="sequences decoded at the same time")] = 64,
    dtype: DtypeName = "float32",
    raw: Annotated[bool, typer.Option("--raw", help="do not apply the chat template")] = False,
) -> None:
    """Answer a prompt, or a file of prompts, by block diffusion.

    [bold]Examples[/bold]

        opdlm generate runs/tiny/checkpoints/final "Tom has 5 apples and buys 4 more. How many apples now?"

        opdlm generate runs/tiny/checkpoints/final "Tom has 5 apples and buys 4 more. How many now?" --show-steps

        opdlm generate runs/tiny/checkpoints/final --file prompts.jsonl --output answers.jsonl
    """
    if (prompt is None) == (file is None):
        raise ConfigError("no prompt or two: give it after MODEL, or a file of prompts with --file")
    if file and not file.is_file():
        raise ConfigError(
            f"--file: {str(file)!r} {'is a folder' if file.is_dir() else 'does not exist'}; give a file of prompts"
        )
    if output:
        check_output("--output", output, ".jsonl")
    records = read_prompt_file(file, question_field) if file else [{question_field: prompt}]
    from deploy.model_checks import check_student_folder, model_errors

    check_student_folder("MODEL", model)
    from actors.evaluation.generation import generate_texts, load_student, sampler_of, token_ids
    from actors.sampler.sampling import Decoding
    from deploy.commands.unmasking_view import unmasking_view

    with model_errors("MODEL", model):
        student, tokenizer = load_student(model, dtype)
    sampler = sampler_of(student, tokenizer, block_size=block_size, slots=min(slots, len(records)), seed=seed)
    questions = [str(record[question_field]) for record in records]
    prompts = [token_ids(tokenizer, question, chat=not raw) for question in questions]
    limit = response_limit(
        max_new_tokens,
        DEFAULT_MAX_TOKENS,
        longest=max(map(len, prompts)),
        positions=student.config.max_position_embeddings,
        block_size=sampler.block_size,
    )
    decoding = Decoding(unmasking_of(rule, threshold), temperature)
    results = generate_texts(sampler, tokenizer, prompts, decoding, max_new_tokens=limit)
    if output:
        lines = [record | answer_record(text, done) for record, (text, done) in zip(records, results, strict=True)]
        with writing("--output", output):
            output.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        say(f"wrote {len(lines)} responses to {output}")
    for question, (text, trajectory) in zip(questions, results, strict=True):
        if output and not show_steps:
            break
        if len(questions) > 1:
            console.print(Text(question, style="dim"))
        if show_steps:
            console.print(unmasking_view(trajectory, tokenizer, sampler.block_size, console))
        else:
            print(text)
        tokens, cut, steps = len(trajectory.response_ids), len(trajectory.tail_ids), trajectory.denoise_forwards
        written = f"{tokens} tokens" + (f" and {cut} that were cut" if cut else "")
        console.print(Text(f"{written} in {steps} steps: {tokens / max(steps, 1):.2f} per step", style="dim"))


def read_prompt_file(file: Path, question_field: str) -> list[dict[str, Any]]:
    """One record per prompt; a .txt file has one prompt a line.

    Raises:
        ConfigError: the file holds no prompt, a record lacks the field, or already has a response.
    """
    if file.suffix == ".txt":
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"--file: {str(file)!r} is not UTF-8 text (byte {error.start}); save it as UTF-8"
            ) from error
        records = [{question_field: line.strip()} for line in lines if line.strip()]
        if not records:
            raise ConfigError(f"--file: no prompt in {str(file)!r}; write one prompt a line")
        return records
    records = []
    try:
        for place, record in read_records(file):
            if not isinstance(record.get(question_field), str):
                raise ConfigError(
                    f"--file: {place}: no text in field {question_field!r}; the record has {sorted(record)}. "
                    "Name the field that holds the prompt with --question-field"
                )
            if "response" in record:
                raise ConfigError(f"--file: {place}: the record has a field 'response' already; rename it")
            records.append(record)
    except PromptError as error:
        raise ConfigError(f"--file: {error}") from error
    return records


def answer_record(text: str, trajectory: Any) -> dict[str, Any]:
    """What is written beside the prompt; counts are of this sequence."""
    return {
        "response": text,
        "response_tokens": len(trajectory.response_ids),
        "denoise_forwards": trajectory.denoise_forwards,
        "commit_forwards": trajectory.commit_forwards,
        "finish_reason": trajectory.finish_reason,
    }
