"""`opdlm ablate`: trains the arms of an ablation and reports them."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deploy.commands.console import console, say
from deploy.named_files import check_writable


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
) -> None:
    """Train every arm of an ablation with every seed, and write a report with tables, curves and verdicts.

    The report is written after every run. To continue an interrupted ablation, repeat the command.

    [bold]Example[/bold]

        opdlm ablate deploy/presets/ablation.yaml
    """
    from deploy.ablation.runs import arms_of, check_runs, load_ablation, run_all

    settings = load_ablation(ablation)
    check_writable("output_dir", settings.output_dir)
    check_writable("report", settings.report.parent)
    runs = arms_of(settings)
    from deploy.ablation.report import write_report

    if report_only:
        finished = sum(arm.done for arm in runs)
        if finished:
            write_report(settings, runs, ablation)
        say(f"{finished} of {len(runs)} runs are finished; report: {settings.report if finished else 'none'}")
        for arm in runs:
            if fields := arm.differences():
                say(f"left out: {arm.name}, seed {arm.seed}, whose run had another config: {'; '.join(fields)}")
        return
    check_runs(settings, runs)
    bar = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True), console=console,
    )  # fmt: skip
    with bar:
        task = bar.add_task("runs", total=len(runs))

        def note(text: str) -> None:
            bar.update(task, description=text)
            if not console.is_terminal:
                say(text)

        def done() -> None:
            bar.advance(task)
            write_report(settings, runs, ablation)

        run_all(settings, runs, note, done, jobs)
    say(f"all {len(runs)} runs are finished; the report is {settings.report}")
