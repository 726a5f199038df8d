"""`opdlm ablate`: trains the arms of an ablation and reports them."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from common.config.errors import ConfigError
from deploy.argument_checks import a_path, finite
from deploy.commands.console import console, say
from deploy.named_files import check_writable

if TYPE_CHECKING:
    from deploy.ablation.config import EvaluateConfig


def register(app: typer.Typer) -> None:
    app.command()(ablate)


def ablate(
    ablation: Annotated[str, typer.Argument(help="YAML file of an ablation", metavar="ABLATION")],
    report_only: Annotated[
        bool, typer.Option("--report-only", help="write the report of the finished runs, but train nothing")
    ] = False,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, help="how many runs at a time, each with all of its processes")
    ] = 1,
    arms: Annotated[
        str | None,
        typer.Option(
            "--arms",
            metavar="A,B,...",
            help="train these arms only, by name; one with a comma in its name is written as its folders are named",
        ),
    ] = None,
    stop_after: Annotated[
        float | None,
        typer.Option(
            "--stop-after",
            metavar="SECONDS",
            min=0,
            callback=finite,
            help="then stop the runs in progress, each after the batch at hand and with a checkpoint",
        ),
    ] = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="go on with other runs where one fails")] = False,
    evaluate: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="evaluate final models on the suites of the ablation")
    ] = True,
    score: Annotated[
        bool,
        typer.Option(
            help="--no-score: keep the responses to suites, where scoring lacks packages; the command without it "
            "scores them, on this or another machine"
        ),
    ] = True,
    suite_data: Annotated[
        Path | None,
        typer.Option(help="folder that holds the suites' files, in place of evaluate.suite_data", callback=a_path),
    ] = None,
) -> None:
    """Train every arm of an ablation with every seed, and write a report with tables, curves and verdicts.

    The report is written after every run. To continue an interrupted ablation, repeat the command: finished runs stay,
    interrupted ones go on from their newest checkpoint. Runs made at a time share the GPU, and must fit it together.
    Where the ablation has suites (evaluate), each final model is evaluated on them when its run is finished.

    [bold]Examples[/bold]

        opdlm ablate deploy/presets/ablation.yaml
        opdlm ablate deploy/presets/ablation-smollm2.yaml --jobs 3 --stop-after 1500 --arms OPDLM,SFT
    """
    from deploy.ablation.runs import Arm, arms_named, arms_of, check_runs, how_far, load_ablation, run_all

    settings = load_ablation(ablation)
    if suite_data is not None:
        if settings.evaluate is None:
            raise ConfigError("--suite-data: this ablation evaluates no suites; give it an evaluate section")
        found_there = settings.evaluate.model_copy(update={"suite_data": str(suite_data)})
        settings = settings.model_copy(update={"evaluate": found_there})
    check_writable("output_dir", settings.output_dir)
    check_writable("report", settings.report.parent)
    runs = arms_of(settings)
    names = arms_named(settings, arms) if arms is not None else list(settings.arms)
    chosen = [arm for arm in runs if arm.name in names]
    from deploy.ablation.progress import runs_table, standing
    from deploy.ablation.report import write_report

    if report_only:
        if arms is not None:
            raise ConfigError("--arms chooses what is trained, and --report-only trains nothing; leave one out")
        finished = sum(arm.done for arm in runs)
        if finished:
            write_report(settings, runs, ablation)
        say(f"{finished} of {len(runs)} runs are finished; report: {settings.report if finished else 'none'}")
        for arm in runs:
            if fields := arm.differences():
                say(f"left out: {arm.name}, seed {arm.seed}, whose run had another config: {'; '.join(fields)}")
        return
    check_runs(settings, runs)
    evaluates = evaluate and settings.evaluate is not None
    if settings.evaluate and evaluate and not all(arm.has_responses(score) for arm in chosen):
        _check_suites(settings.evaluate, score)
    bar = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    found = sum(arm.done for arm in chosen)
    evaluated = sum(arm.done and arm.has_responses(score) for arm in chosen) if evaluates else 0
    task = bar.add_task("runs", total=len(chosen) * (1 + evaluates), completed=found + evaluated)
    if found:
        write_report(settings, runs, ablation)

    def shown() -> Group:
        now = [(arm, standing(arm)) for arm in chosen]
        return Group(bar, runs_table([(arm, state) for arm, state in now if state.in_progress]))

    def note(text: str) -> None:
        bar.update(task, description=text)
        if not console.is_terminal:
            say(text)

    lock = threading.Lock()

    def done(arm: Arm) -> None:
        bar.advance(task)
        with lock:  # runs may end together
            write_report(settings, runs, ablation)

    live = Live(get_renderable=shown, console=console, refresh_per_second=1, transient=True)
    try:
        with live if console.is_terminal else nullcontext():
            run_all(
                runs, note, done, jobs, chosen=chosen, stop_after_s=stop_after, keep_going=keep_going,
                evaluate=evaluate, score=score,
            )  # fmt: skip
    finally:
        console.print(runs_table([(arm, standing(arm)) for arm in chosen]))
    if not all(arm.done and (arm.has_responses(score) or not evaluate) for arm in chosen):
        say(f"--stop-after: {how_far(chosen)}; to go on, repeat the command")
        return
    ended = "" if not evaluates else " and evaluated" if score else ", and the responses to suites kept"
    say(f"all {len(chosen)} runs are finished{ended}; the report is {settings.report}")


def _check_suites(evaluate: EvaluateConfig, score: bool) -> None:
    """Refuse, before anything is trained, what `opdlm eval` would refuse afterwards.

    Raises:
        ConfigError: a suite is unknown, cannot be scored here, or is not in the folder of suites.
    """
    from deploy.evaluation.problems import source_of
    from deploy.evaluation.suite_options import SuiteOptions
    from deploy.evaluation.suites import SUITES

    folder = Path(evaluate.suite_data) if evaluate.suite_data else None
    asked = SuiteOptions(
        evaluate.suites, folder, evaluate.problems, None, None, "question", "answer", None, None, 0, evaluate.count,
        evaluate.run_code,
    )  # fmt: skip
    try:
        asked.check(score)
        for suite in evaluate.suites:
            if suite in SUITES:
                source_of(SUITES[suite], None, folder)
    except ConfigError as error:
        raise ConfigError(f"evaluate: {error}") from error
