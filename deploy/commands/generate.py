"""`opdlm generate`: answers to one prompt or to a file of prompts, and how they were unmasked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from common.config.data import DataConfig
from common.config.errors import ConfigError
from common.datasets.errors import PromptError
from common.datasets.formats import read_lines
from common.datasets.rows import open_rows
from common.prompts import Prompt, render
from deploy.argument_checks import a_path
from deploy.commands.console import console, say
from deploy.data_fingerprint import of_prompts
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
    DEFAULT_LOWER,
    DEFAULT_THRESHOLD,
    Adapter,
    BlockSize,
    DraftRounds,
    DtypeName,
    Lower,
    Revise,
    Rule,
    RuleName,
    Student,
    Temperature,
    Threshold,
    Verify,
    response_limit,
    unmasking_of,
)
from deploy.evaluation.response_file import ResponseFile, as_json
from deploy.named_files import check_output, writing

DEFAULT_MAX_TOKENS = 256

_WRITTEN = ("response", "response_tokens", "denoise_forwards", "commit_forwards", "finish_reason")


def register(app: typer.Typer) -> None:
    app.command()(generate)


def generate(
    model: Student,
    prompt: Annotated[str | None, typer.Argument(help="the prompt; or use --file", metavar="PROMPT")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help=".txt with one prompt a line, or .jsonl, .json, .csv, .parquet, or a folder of these", callback=a_path
        ),
    ] = None,
    question_field: Annotated[str, typer.Option(help="field of a record in --file that holds the prompt")] = "question",
    split: Split = None,
    subset: Subset = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="write this .jsonl file: every prompt's record with its response and its counts", callback=a_path
        ),
    ] = None,
    adapter: Adapter = None,
    show_steps: Annotated[
        bool, typer.Option("--show-steps", help="show how the text was unmasked, round by round")
    ] = False,
    rule: Rule = RuleName.dynamic,
    threshold: Threshold = DEFAULT_THRESHOLD,
    lower: Lower = DEFAULT_LOWER,
    draft_rounds: DraftRounds = 1,
    verify: Verify = "self",
    revise: Revise = 0.0,
    block_size: BlockSize = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"response length limit, tokens; default: {DEFAULT_MAX_TOKENS}, or less where the positions end"
        ),
    ] = None,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="seed of the sampling")] = 0,
    slots: Annotated[int, typer.Option(min=1, help="sequences decoded at the same time")] = 64,
    dtype: DtypeName = "float32",
    thinking: Thinking = None,
    system: System = None,
    template: Template = None,
    raw: Annotated[bool, typer.Option("--raw", help="do not apply the chat template")] = False,
) -> None:
    """Answer a prompt, or a file of prompts, by block diffusion.

    With --output every response is written as soon as it is done. To continue an interrupted command, repeat it.

    [bold]Examples[/bold]

        opdlm generate runs/tiny/checkpoints/final "Tom has 5 apples and buys 4 more. How many apples now?"

        opdlm generate runs/tiny/checkpoints/final "Tom has 5 apples and buys 4 more. How many now?" --show-steps

        opdlm generate runs/tiny/checkpoints/final --file prompts.jsonl --output answers.jsonl

        opdlm generate SmolLM2-135M-Instruct --adapter runs/drafter-smollm2/checkpoints/final --rule speculative "Hello"
    """
    if (prompt is None) == (file is None):
        raise ConfigError("no prompt or two: give it after MODEL, or a file of prompts with --file")
    if file and not file.exists():
        raise ConfigError(f"--file: {str(file)!r} does not exist; give a file of prompts, or a folder of them")
    if output:
        check_output("--output", output, ".jsonl")
    if file and output and output.exists() and output.samefile(file):
        raise ConfigError(f"--output: {str(output)!r} is the file of the prompts; choose another")
    if prompt is not None and not prompt.strip():
        raise ConfigError("PROMPT: it is empty; give a question")
    rows = _rows_of(file, question_field, split, subset) if file else [("PROMPT", {question_field: prompt})]
    records = [as_record(place, record) for place, record in rows]
    from deploy.model_checks import StudentPath, check_student_folder, model_errors, verifier_of

    at = StudentPath.of(model, adapter)
    check_student_folder(at.field, at.folder, at.base)
    original = verifier_of(verify, at, [rule])
    asked = asked_like_training(at.folder, thinking, system, template)
    if template is None or raw:
        asked.pop("templates", None)  # a prompt is asked as it is given
    if raw:
        asked.pop("system", None)
    data = DataConfig(prompts=str(file or "PROMPT"), question_field=question_field, **asked)
    from actors.evaluation.generation import generate_texts, load_student, load_verifier, sampler_of
    from actors.sampler.sampling import Decoding
    from common.student import load_config, load_tokenizer
    from deploy.commands.unmasking_view import unmasking_view

    with model_errors(at.field, at.folder):
        tokenizer, model_config = load_tokenizer(at.folder), load_config(at.folder)
    check_thinking("--thinking", thinking, tokenizer)
    try:
        prompts = render(rows, data, tokenizer, raw=raw)
    except PromptError as error:
        raise ConfigError(("--file: " if file else "") + with_options_named(str(error))) from error
    block_size = block_size or int(model_config.block_size)
    limit = response_limit(
        max_new_tokens,
        DEFAULT_MAX_TOKENS,
        longest=max(len(p.ids) for p in prompts),
        positions=model_config.max_position_embeddings,
        block_size=block_size,
    )
    with model_errors(at.field, at.folder):
        student, tokenizer = load_student(at.folder, dtype, base=at.base)
    verifier = None
    if original:
        with model_errors("--verify", original):
            verifier = load_verifier(original, dtype)
    slots = min(slots, len(prompts))
    sampler = sampler_of(student, tokenizer, block_size=block_size, slots=slots, seed=seed, verifier=verifier)
    unmasking = unmasking_of(rule, threshold, lower, draft_rounds, revise, "base" if original else "self")
    decoding = Decoding(unmasking, temperature)
    settings = {
        "model": str(Path(at.folder).resolve()),
        **({"base": str(Path(at.base).resolve())} if at.base else {}),
        **({"verifier": str(Path(original).resolve())} if original else {}),
        "prompts": of_prompts(prompts),
        "rule": decoding.unmasking.model_dump(exclude=set() if revise else {"revise"}),
        "block_size": block_size,
        "max_new_tokens": limit,
        "temperature": temperature,
        "seed": seed,
        "dtype": dtype,
    }
    with ResponseFile(output, settings, records) if output else nullcontext() as responses:
        if responses and responses.done:
            say(f"{len(responses.done)} of {len(prompts)} responses are in {output} already")
        left = [p for p in prompts if not responses or p.ordinal not in responses.done]
        results = generate_texts(sampler, tokenizer, left, decoding, max_new_tokens=limit)
        if responses:
            results = _written(results, responses)
        for answered, text, trajectory in _in_order(results, left):
            if output and not show_steps:
                continue
            if len(prompts) > 1:
                console.print(Text(answered.question, style="dim"))
            if show_steps:
                console.print(unmasking_view(trajectory, tokenizer, sampler.block_size, console))
            else:
                print(text)
            tokens, cut, steps = len(trajectory.response_ids), len(trajectory.tail_ids), trajectory.denoise_forwards
            written = f"{tokens} tokens" + (f" and {cut} that were cut" if cut else "")
            unit = "forward" if rule == RuleName.speculative else "step"
            console.print(Text(f"{written} in {steps} {unit}s: {tokens / max(steps, 1):.2f} per {unit}", style="dim"))
    if sampler.verifier:
        say(f"verified by {original}, which took {sampler.verifier.memory_bytes / 2**20:.1f} MiB beside the student")
    if output:
        say(f"wrote {len(prompts)} responses to {output}")


def _written(results: Iterator[Any], responses: ResponseFile) -> Iterator[Any]:
    """Each result, once it is in the file."""
    for prompt, text, trajectory in results:
        with writing("--output", responses.path):
            responses.write(prompt.ordinal, answer_record(text, trajectory))
        yield prompt, text, trajectory


def _in_order(results: Iterator[Any], prompts: list[Prompt]) -> Iterator[Any]:
    """Results in the order of their prompts, each as soon as those before it have come."""
    waiting: dict[int, Any] = {}
    order = iter([p.ordinal for p in prompts])
    following = next(order, None)
    for result in results:
        waiting[result[0].ordinal] = result
        while following in waiting:
            yield waiting.pop(following)
            following = next(order, None)


def _rows_of(
    file: Path, question_field: str, split: str | None, subset: str | None
) -> list[tuple[str, dict[str, Any]]]:
    """(place, record) of every prompt; a .txt file has one prompt a line.

    Raises:
        ConfigError: the file cannot be read or holds no prompt.
    """
    try:
        if file.suffix.lower() == ".txt":
            rows: list[tuple[str, dict[str, Any]]] = [
                (f"{file}, line {number}", {question_field: line}) for number, line in read_lines(file)
            ]
        else:
            source = open_rows(str(file), split, subset)
            rows = list(source)
            for note in source.notes:
                say(note)
    except PromptError as error:
        raise ConfigError(f"--file: {with_options_named(str(error))}") from error
    if not rows:
        raise ConfigError(f"--file: no prompt in {str(file)!r}; write one prompt a line")
    return rows


def as_record(place: str, record: dict[str, Any]) -> str:
    """The record as it will be written, made before anything is decoded, so that no response is lost to it.

    Raises:
        ConfigError: it has a field that the response needs, or is nested too deep.
    """
    if taken := [name for name in _WRITTEN if name in record]:
        raise ConfigError(f"--file: {place}: the record has a field {taken[0]!r} already; rename it")
    try:
        return as_json(record)
    except RecursionError as error:
        raise ConfigError(f"--file: {place}: nested too deep to be written; remove the field that is") from error


def answer_record(text: str, trajectory: Any) -> dict[str, Any]:
    """What is written beside the prompt; counts are of this sequence."""
    return {
        "response": text,
        "response_tokens": len(trajectory.response_ids),
        "denoise_forwards": trajectory.denoise_forwards,
        "commit_forwards": trajectory.commit_forwards,
        "finish_reason": trajectory.finish_reason,
    }
