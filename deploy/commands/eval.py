"""`opdlm eval`: scores and decoding speed of a student on suites, swept over decoding settings, beside its original."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.config.errors import ConfigError
from common.config.evaluation import AnswerFormat
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
    DEFAULT_LOWER,
    DEFAULT_THRESHOLD,
    REVISE_HELP,
    Adapter,
    DtypeName,
    RuleName,
    Student,
    Temperature,
    Verify,
    response_limit,
)
from deploy.named_files import check_output, writing

if TYPE_CHECKING:  # torch takes seconds
    from actors.evaluation.worker import ModelSpec
    from deploy.evaluation.problems import SuiteProblems
    from deploy.evaluation.results import Row, Scored
    from deploy.evaluation.sweep import Progress, Setting, Sweep
    from deploy.evaluation.unscored import Unscored

PROBLEMS_SUFFIX = ".problems.jsonl"


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    model: Student,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=SOURCE]",
            help="what to evaluate on, repeatable: gsm8k, math500, ifeval, humaneval, mbpp, arc, mmlu, from a file or "
            "the hub; or any name with a file of questions and answers",
        ),
    ] = None,
    suite_data: Annotated[
        Path | None,
        typer.Option(help="folder that holds the suites' files, such as gsm8k_test.jsonl", callback=a_path),
    ] = None,
    problems: Annotated[
        str | None,
        typer.Option(
            help="JSON, JSONL, CSV or Parquet with a question and an answer a row, a folder of them, or the hub id of "
            "a data set",
            callback=a_path,
        ),
    ] = None,
    split: Split = None,
    subset: Subset = None,
    question_field: Annotated[str, typer.Option(help="field of a row that holds the question")] = "question",
    answer_field: Annotated[str, typer.Option(help="field of a row that holds the answer")] = "answer",
    shots: Annotated[int, typer.Option(min=0, help="worked examples before each problem of a suite")] = 0,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="run the programs that the model writes, for humaneval and mbpp")
    ] = False,
    score: Annotated[
        bool,
        typer.Option(
            help="--no-score: keep the responses in OUTPUT.unscored.json.gz, for `opdlm score` on a machine that has "
            "what scoring needs"
        ),
    ] = True,
    rule: Annotated[
        list[RuleName] | None,
        typer.Option(
            "--rule",  # typer 0.27 would spell it --RULE, after the metavar
            metavar="RULE",
            help="which masked tokens a step reveals, repeatable: static (the most confident), sequential (the "
            "leftmost), dynamic (all above the threshold), entropy_bound (the most certain, up to a total entropy), "
            "adaptive (all above a threshold that follows the confidences seen) or speculative (a block, of which the "
            "causal reading keeps what it would have written); default: static and dynamic",
        ),
    ] = None,
    threshold: Annotated[
        list[float] | None,
        typer.Option(
            callback=finite,
            min=0,
            max=1,
            help="confidence threshold of the dynamic rule, upper bound of that of the adaptive one, repeatable; "
            "default: 0.9",
        ),
    ] = None,
    lower: Annotated[
        list[float] | None,
        typer.Option(
            callback=finite,
            min=0,
            max=1,
            help="lower bound of the adaptive rule's threshold, repeatable; default: 0.6",
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
    draft_rounds: Annotated[
        list[int] | None,
        typer.Option(min=1, help="steps of a draft under the speculative rule, repeatable; default: 1"),
    ] = None,
    revise: Annotated[
        list[float] | None,
        typer.Option(callback=finite, min=0, max=0.999, help=f"{REVISE_HELP}; repeatable; default: 0"),
    ] = None,
    verify: Verify = "self",
    block_size: Annotated[
        list[int] | None, typer.Option(min=1, help="tokens per block, repeatable; default: the model's own")
    ] = None,
    adapter: Adapter = None,
    original: Annotated[
        str | None,
        typer.Option(
            "--original",
            "--teacher",
            help="folder of the autoregressive model that the student was made from, which is evaluated too; default: "
            "the one that the run's config names; none: leave it out",
            callback=a_path,
        ),
    ] = None,
    temperature: Temperature = 0.0,
    seeds: Annotated[
        int, typer.Option(min=1, help="runs per setting, each with its own seed, if the temperature is above 0")
    ] = 1,
    samples: Annotated[
        int,
        typer.Option(
            min=1, help="responses per problem in each run, for avg@k and pass@k; needs a temperature above 0"
        ),
    ] = 1,
    count: Annotated[
        int | None, typer.Option(min=1, help="evaluate the first N problems of each suite; default: all")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="response length limit, tokens; default: each suite's own, or less where the positions end"
        ),
    ] = None,
    answer_format: Annotated[
        AnswerFormat | None,
        typer.Option(
            help="what is read as a response's answer: what stands after 'Answer:' (default with --problems), the last "
            "\\boxed{}, or the last number; default: each suite's own"
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="write the results to this .json file, every response to .problems.jsonl and the plot to .png of the "
            "same name; an interrupted command goes on where it stood",
            callback=a_path,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="write the plot of scores against tokens per step to this .png file", callback=a_path),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="sequences decoded at the same time, in one process")] = 64,
    dtype: DtypeName = "float32",
    actors: Annotated[
        int | None, typer.Option(min=1, help="deal the problems out to so many processes, on the CPUs of a Ray cluster")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="deal the problems out to so many GPUs of a Ray cluster")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="of the Ray cluster (host:port or auto); default: one started here")
    ] = None,
    thinking: Thinking = None,
    system: System = None,
    template: Template = None,
    autoregressive: Annotated[
        bool, typer.Option("--autoregressive", help="evaluate MODEL as an autoregressive LM, such as an original")
    ] = False,
) -> None:
    """Scores, tokens per step and speed of a student on benchmarks, beside those of its autoregressive original.

    Options marked as repeatable may be given several times. Then all combinations are evaluated: each suite under each
    rule, with each value of its own parameter, at each block size.

    [bold]Examples[/bold]

        opdlm eval runs/mine/checkpoints/final --suite gsm8k --suite ifeval --dtype bfloat16 --output eval.json

        opdlm eval runs/mine/checkpoints/final --suite humaneval=humaneval.jsonl --run-code --gpus 8 --samples 10
        --temperature 0.8 --threshold 0.8 --threshold 0.9

        opdlm eval runs/tiny/checkpoints/final --problems deploy/data/word_problems_heldout.jsonl
        --block-size 4 --block-size 8 --max-new-tokens 72 --output eval.json
    """
    from deploy.evaluation.suite_options import SuiteOptions

    student_only = {
        "--rule": rule,
        "--threshold": threshold,
        "--lower": lower,
        "--tokens-per-step": tokens_per_step,
        "--bound": bound,
        "--draft-rounds": draft_rounds,
        "--revise": revise,
        "--block-size": block_size,
        "--original": original,
        "--adapter": adapter,
        "--verify": None if verify == "self" else verify,
    }
    rules = [str(r) for r in rule or [RuleName.static, RuleName.dynamic]]
    _check_options(rules, student_only, autoregressive, output, plot)
    _check_processes(actors, gpus, address)
    if samples > 1 and not temperature:
        raise ConfigError(f"--samples: {samples} greedy responses would be the same; set a --temperature above 0")
    asked_for = SuiteOptions(
        suite or [], suite_data, problems, split, subset, question_field, answer_field, answer_format, template, shots,
        count, run_code,
    )  # fmt: skip
    asked_for.check(score)
    if not score and not output:
        raise ConfigError("--no-score: has nowhere to keep the responses; give an --output")
    from deploy.evaluation.original import original_of
    from deploy.model_checks import (
        StudentPath,
        check_model_folder,
        check_student_folder,
        model_errors,
        model_json,
        verifier_of,
    )

    at = StudentPath.of(model, adapter)
    if autoregressive:
        check_model_folder("MODEL", model)
        beside, found, verifier = None, "", None
    else:
        check_student_folder(at.field, at.folder, at.base)
        verifier = verifier_of(verify, at, rules)
        beside, found = original_of(at.folder, original, at.base)
    if beside:
        check_model_folder("--original", beside)
    if found:
        say(found)
    from common.grid import grid_floor
    from common.student import load_config, load_tokenizer

    with model_errors(at.field, at.folder):
        tokenizer, positions = load_tokenizer(at.folder), load_config(at.folder).max_position_embeddings
    check_thinking("--thinking", thinking, tokenizer)
    sizes = block_size or ([int(model_json(at.field, at.folder)["block_size"])] if not autoregressive else [1])
    asked = asked_like_training(at.folder, thinking, system, template)
    suites = asked_for.load(tokenizer, asked, grid_floor(positions, max(sizes)))
    longest = max(len(problem.ids) for each in suites for problem in each.problems)
    if max_new_tokens:
        response_limit(max_new_tokens, max_new_tokens, longest=longest, positions=positions, block_size=max(sizes))

    from actors.evaluation.worker import ModelSpec
    from deploy.evaluation.results import report
    from deploy.evaluation.sweep import Setting, Sweep, settings_of
    from deploy.versions import installed_versions

    sweep = Sweep(suites, grid_floor(positions, max(sizes)), max_new_tokens, temperature, seeds, samples, slots, dtype)
    for each in suites:
        _say_what_is_special(each, sweep.limit(each), sweep.positions)
    student_settings = settings_of(
        rules,
        threshold or [DEFAULT_THRESHOLD],
        tokens_per_step or [1],
        bound or [0.1],
        lower or [DEFAULT_LOWER],
        sizes,
        draft_rounds or [1],
        revise or [0.0],
        "base" if verifier else "self",
    )
    models: list[tuple[str, ModelSpec, list[Setting]]] = []
    if not autoregressive:
        student = ModelSpec("student", at.folder, dtype, slots, base=at.base, verifier=verifier)
        models.append((at.field, student, student_settings))
    if autoregressive or beside:
        option, path = ("MODEL", model) if autoregressive else ("--original", beside)
        ends = None if autoregressive else model_json(at.field, at.folder).get("end_token_ids")
        models.append((option, ModelSpec("original", str(path), dtype, slots, ends and tuple(ends)), [Setting()]))
    unscored, device = _responses(sweep, models, output, actors, gpus, address)
    facts = {
        "asked": asked,
        "device": device,
        "processes": actors or gpus or 1,
        "versions": installed_versions(),
    }
    if score or not output:
        score_and_write(report(sweep, facts), unscored, output, plot)
        return
    from deploy.evaluation import unscored as unscored_file
    from deploy.evaluation.parts import Parts

    kept = output.with_name(output.stem + unscored_file.SUFFIX)
    with writing("--output", kept):
        unscored_file.save(kept, report(sweep, facts), unscored)
    Parts(output).remove()
    say(f"responses: {kept}; to score them, here or elsewhere: opdlm score {kept}")


def score_and_write(report: dict[str, Any], unscored: list[Unscored], output: Path | None, plot: Path | None) -> None:
    """Scores, tables on the console, and the files of the results; `report` is that of the sweep, without rows."""
    from deploy.evaluation.results import Scored, rows_of

    with _progress() as progress:
        scored = [Scored.of(each.suite, each.spec, each.setting, each.runs, progress) for each in unscored]
    rows = rows_of(scored)
    _show(rows)
    paths = dict.fromkeys(row.path for row in rows if row.model == "student" or len(rows) == 1)
    suites = dict.fromkeys(row.suite for row in rows)
    _write(report, rows, scored, output, plot, f"{', '.join(paths)} on {', '.join(suites)}")


def _responses(
    sweep: Sweep,
    models: list[tuple[str, ModelSpec, list[Setting]]],
    output: Path | None,
    actors: int | None,
    gpus: int | None,
    address: str | None,
) -> tuple[list[Unscored], str]:
    """The responses, suite by suite with the original first, and the device."""
    from deploy.evaluation.parts import Parts
    from deploy.evaluation.sweep import SweptModel
    from deploy.evaluation.unscored import Unscored
    from deploy.evaluation.workers import RayWorkers, ThisProcess, Workers

    parts = Parts(output)
    workers: Workers = ThisProcess()
    if actors or gpus:
        workers = RayWorkers(actors or gpus or 1, on_gpus=bool(gpus), address=address)
    runs = []
    with _progress() as progress, workers:
        for option, spec, settings in models:
            swept = SweptModel(option, spec, sweep, workers, parts, progress)
            for suite in sweep.suites:
                runs += [Unscored(suite, spec, setting, swept.run(suite, setting)) for setting in settings]
    order = {suite.suite.name: place for place, suite in enumerate(sweep.suites)}
    return sorted(runs, key=lambda run: (order[run.suite.suite.name], run.spec.kind != "original")), workers.device


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar for what is being done; on no terminal a line when something new begins. Both go to standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    from deploy.evaluation.sweep import Progress

    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, TimeRemainingColumn(), console=errors, transient=True, disable=not errors.is_terminal) as bars:
        task = bars.add_task("loading the model", total=None)

        def begin(what: str, steps: int) -> None:
            bars.reset(task, description=what, total=steps)
            if not errors.is_terminal:
                errors.print(f"{what}: {steps} responses", highlight=False)

        yield Progress(begin, lambda steps: bars.advance(task, steps))


def _say_what_is_special(suite: SuiteProblems, limit: int, positions: int) -> None:
    """How a suite's source was read, what is left out, and what cannot be done here."""
    from deploy.evaluation.code_execution import sandbox_notes

    name = suite.suite.name
    for note in (*suite.notes, *(f"{number} left out: {reason}" for reason, number in suite.left_out.items())):
        say(f"{name}: {with_options_named(note)}")
    if less := suite.less_room(limit, positions):
        say(f"{name}: {less} of {len(suite.problems)} prompts leave less than {limit} tokens for the response")
    for note in sandbox_notes() if suite.suite.scorer == "code" else ():
        say(f"{name}: {note}")


def _check_options(
    rules: list[str], student_only: dict[str, Any], autoregressive: bool, output: Path | None, plot: Path | None
) -> None:
    """Refuse options that would have no effect, or files that cannot be written, before a model is loaded."""
    if autoregressive and (given := [name for name, value in student_only.items() if value]):
        raise ConfigError(f"{given[0]}: has no meaning with --autoregressive; leave one of them out")
    needs = {
        "--threshold": ("dynamic", "adaptive", "speculative"),
        "--lower": ("adaptive",),
        "--tokens-per-step": ("sequential", "static"),
        "--bound": ("entropy_bound",),
        "--draft-rounds": ("speculative",),
        "--verify": ("speculative",),
    }
    for name, users in needs.items():
        if student_only[name] and not set(users) & set(rules):
            raise ConfigError(f"{name}: no rule of this sweep uses it; add --rule {' or '.join(users)}")
    for name, path, suffix in (("--output", output, ".json"), ("--plot", plot, ".png")):
        if path:
            check_output(name, path, suffix)


def _check_processes(actors: int | None, gpus: int | None, address: str | None) -> None:
    if actors and gpus:
        raise ConfigError("--actors: are processes on CPUs; leave it out with --gpus")
    if address and not actors and not gpus:
        raise ConfigError("--address: say how many processes to use there, with --gpus or --actors")
    if gpus and not address:
        import torch

        if torch.cuda.device_count() < gpus:
            raise ConfigError(
                f"--gpus: {gpus} are asked for, and torch finds {torch.cuda.device_count()} on this machine; use "
                "fewer, or give the --address of a Ray cluster"
            )


def _show(rows: list[Row]) -> None:
    """A list of metrics for a single run, else a table for each suite."""
    from deploy.evaluation.sweep_report import tables

    if len(rows) == 1 and len(rows[0].metrics[rows[0].score].seeds) == 1:
        for name in rows[0].metrics:
            console.print(f"{name:>32}  {rows[0].mean(name):.4g}", highlight=False)
        for name, number in {"problems": rows[0].problems, "seconds": rows[0].seconds, **rows[0].facts}.items():
            console.print(f"{name:>32}  {number:.4g}", highlight=False)
    else:
        for table in tables(rows, console.width):
            console.print(table)


def _write(
    report: dict[str, Any],
    rows: list[Row],
    scored: list[Scored],
    output: Path | None,
    plot: Path | None,
    title: str,
) -> None:
    from deploy.evaluation import sweep_report
    from deploy.evaluation.parts import Parts
    from deploy.evaluation.response_file import as_json

    report = {**report, "rows": [asdict(row) for row in rows]}
    if output:
        every = output.with_suffix(PROBLEMS_SUFFIX)
        with writing("--output", output):
            with every.open("w", encoding="utf-8") as file:
                file.writelines(as_json(record) + "\n" for each in scored for record in each.records())
            output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        Parts(output).remove()
        say(f"results: {output}, every response: {every}")
    if image := plot or (output.with_suffix(".png") if output else None):
        with writing("--plot", image):
            sweep_report.plot(rows, image, title)
        say(f"plot: {image}")
