"""The run's progress in the terminal: bars with the expected end, the rate of every stage, the figures that matter."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bars,
)
from rich.table import Table

_STAGES = ("rollout", "teacher", "learner", "publish")


class Progress:
    """A live display on a terminal, one plain line per rollout batch elsewhere."""

    def __init__(self, total_batches: int, name: str, console: Console | None = None) -> None:
        self.console = console or Console()
        self.total = total_batches
        self.figures: dict[str, float] = {}
        self.status = ""
        self.started = time.monotonic()
        self._bars = Bars(
            TextColumn("{task.description:>12}"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._run = self._bars.add_task(name, total=total_batches, start=False)
        self._parts = {stage: self._bars.add_task(stage, total=None, visible=False) for stage in ("rollout", "teacher")}
        self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.status = ""
        if self._live.is_started:
            self._live.stop()

    def stage(self, stage: str, done: int, total: int) -> None:
        """Trajectories of the current batch that are through a stage."""
        self._bars.update(self._parts[stage], completed=done, total=total, visible=True)

    def training(self) -> None:
        """The first rollout batch begins: the expected end counts from here."""
        self.status = ""
        self._bars.start_task(self._run)

    def batch(self, metrics: dict[str, float]) -> None:
        """A rollout batch is through."""
        self.figures = metrics
        done = int(metrics["batch"]) + 1
        self._bars.update(self._run, completed=done)
        if not self.console.is_terminal:
            self.console.print(
                f"batch {done}/{self.total}  KL {metrics['kl']:.4f}  tokens/step {metrics['tokens_per_step']:.2f}  "
                f"limit {metrics['response_limit']:.0f}  lr {metrics['lr']:.2e}  "
                f"version {metrics['weights_version']:.0f}  "
                f"rollout {metrics['rollout/tokens_per_second']:.0f} tok/s  "
                f"teacher {metrics['teacher/tokens_per_second']:.0f} tok/s  "
                f"learner {metrics['learner/tokens_per_second']:.0f} tok/s  {metrics['seconds/batch']:.2f} s",
                soft_wrap=True,
                highlight=False,
            )

    def note(self, text: str) -> None:
        """What happens now; stays visible in a terminal's scroll-back too."""
        self.status = text
        self.console.print(f"[dim]{time.monotonic() - self.started:7.1f} s[/dim]  {text}", highlight=False)

    def _render(self) -> Group:
        parts: list[Any] = [self._bars]
        if self.figures:
            parts.append(self._table())
        return Group(*parts)

    def _table(self) -> Table:
        m = self.figures
        table = Table(box=None, padding=(0, 2))
        for column in ("stage", "tokens/s", "seconds", "share of batch"):
            table.add_column(column, justify="left" if column == "stage" else "right")
        for stage in _STAGES:
            rate = m.get(f"{stage}/tokens_per_second")
            seconds = m[f"seconds/{stage}"]
            table.add_row(
                stage,
                f"{rate:,.0f}" if rate is not None else "",
                f"{seconds:.2f}",
                f"{seconds / max(m['seconds/batch'], 1e-9):.0%}",
            )
        table.add_section()
        table.add_row(
            f"KL {m['kl']:.4f}",
            f"{m['tokens_per_step']:.2f} tok/step",
            f"limit {m['response_limit']:.0f}",
            f"version {m['weights_version']:.0f}, staleness {m['staleness']:.0f}",
        )
        return table


def summary_table(summary: dict[str, Any]) -> Table:
    """Exact match and tokens per step of the teacher and of the student before and after."""
    table = Table(title="held-out problems", title_justify="left")
    table.add_column("model")
    table.add_column("decoding")
    table.add_column("exact match", justify="right")
    table.add_column("tokens per step", justify="right")
    student = summary.get("student", {})
    rows = [
        ("teacher", "autoregressive, greedy", summary.get("teacher")),
        ("student, converted", "static", summary.get("student_init")),
        ("student, trained", "static", student.get("static")),
        ("student, trained", "dynamic", student.get("dynamic")),
    ]
    for model, decoding, figures in rows:
        if figures:
            table.add_row(model, decoding, f"{figures['exact_match']:.1%}", f"{figures['tokens_per_step']:.2f}")
    return table
