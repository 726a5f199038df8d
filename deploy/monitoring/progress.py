"""The run's progress in the terminal: bars with the expected end, the rate of every stage, the metrics that matter."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from deploy.monitoring.observer import Note, Observer
from deploy.monitoring.pace import Pace
from deploy.roles import ROLES, STAGES

_LABEL_WIDTH, _BAR_WIDTH = 12, 40
_STYLES = {"info": "", "warning": "yellow", "error": "bold red"}


class Progress(Observer):
    """A live display on a terminal, one plain line per rollout batch elsewhere. Notes stay in the scroll-back."""

    def __init__(self, total_batches: int, name: str, done: int = 0, console: Console | None = None) -> None:
        self.console = console or Console()
        self.metrics: Mapping[str, Any] = {}
        self.started = time.monotonic()
        label = TextColumn(f"{{task.description:>{_LABEL_WIDTH}}}")
        count = MofNCompleteColumn()
        left = TextColumn("left {task.fields[left]}")
        self._run_bar = Bars(
            label, BarColumn(_BAR_WIDTH), count, TextColumn("batches"), TimeElapsedColumn(), left
        )  # fmt: skip
        self._run = self._run_bar.add_task(name, total=total_batches, completed=done, left="-:--:--")
        self._stage_bars = Bars(label, BarColumn(_BAR_WIDTH), count, TextColumn("trajectories of this batch"))
        self._stages: dict[str, Any] = {}
        self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def end(self, error: BaseException | None) -> None:
        if self._live.is_started:
            self._live.stop()

    def note(self, note: Note) -> None:
        if note.level != "detail":
            seconds = (f"{time.monotonic() - self.started:7.1f} s", "dim")
            self.console.print(Text.assemble(seconds, "  ", (note.text, _STYLES[note.level])), soft_wrap=True)

    def active(self, working: Mapping[str, str], stages: Mapping[str, tuple[int, int]]) -> None:
        for stage, (done, total) in stages.items():
            if stage not in self._stages:
                self._stages[stage] = self._stage_bars.add_task(stage)
            self._stage_bars.update(self._stages[stage], completed=done, total=total)

    def batch(self, metrics: Mapping[str, Any], pace: Pace) -> None:
        self.metrics = metrics
        left = timedelta(seconds=round(pace.seconds_left or 0))
        self._run_bar.update(self._run, completed=pace.done, left=str(left))
        if not self.console.is_terminal:
            rates = "  ".join(f"{role} {metrics[f'{role}/tokens_per_second']:.0f} tok/s" for role in ROLES)
            self.console.print(
                f"batch {pace.done}/{pace.batches}  {self._headline()}  {rates}  "
                f"{metrics['seconds/batch']:.2f} s  left {left}",
                soft_wrap=True,
                highlight=False,
            )

    def _headline(self) -> str:
        m = self.metrics
        return (
            f"KL {m['kl']:.4f}  tokens/step {m['tokens_per_step']:.2f}  limit {m['response_limit']:.0f}  "
            f"lr {m['lr']:.2e}  version {m['weights_version']:.0f}  staleness {m['staleness']:.0f}"
        )

    def _render(self) -> Group:
        if not self.metrics:
            return Group(self._run_bar, self._stage_bars)
        return Group(self._run_bar, self._stage_bars, self._table(), Text("  " + self._headline(), style="bold"))

    def _table(self) -> Table:
        m = self.metrics
        table = Table(box=None, padding=(0, 2))
        for column in ("last batch", "tokens/s", "seconds", "of wall time"):
            table.add_column(column, justify="left" if column == "last batch" else "right")
        for stage in STAGES:
            rate, seconds = m.get(f"{stage}/tokens_per_second"), m[f"seconds/{stage}"]
            share = seconds / max(m["seconds/batch"], 1e-9)
            table.add_row(stage, "" if rate is None else f"{rate:,.0f}", f"{seconds:.2f}", f"{share:.0%}")
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
    for model, decoding, metrics in rows:
        if metrics:
            table.add_row(model, decoding, f"{metrics['exact_match']:.1%}", f"{metrics['tokens_per_step']:.2f}")
    return table
