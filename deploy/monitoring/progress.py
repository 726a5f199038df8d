"""The run's progress in the terminal: bars with the expected end, the rate of every stage, the metrics that matter."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

_STAGES = ("rollout", "teacher", "learner", "publish")
_LABEL_WIDTH, _BAR_WIDTH = 12, 40


class Progress:
    """A live display on a terminal, one plain line per rollout batch elsewhere."""

    def __init__(self, total_batches: int, name: str, console: Console | None = None) -> None:
        self.console = console or Console()
        self.total = total_batches
        self.metrics: dict[str, float] = {}
        self.started = self.training_started = time.monotonic()
        self.first: tuple[float, int] | None = None  # when the first batch of this process was through, and its number
        label = TextColumn(f"{{task.description:>{_LABEL_WIDTH}}}")
        count = MofNCompleteColumn()
        self._run_bar = Bars(
            label, BarColumn(_BAR_WIDTH), count, TextColumn("batches"), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self._run = self._run_bar.add_task(name, total=total_batches, start=False)
        self._stage_bars = Bars(label, BarColumn(_BAR_WIDTH), count, TextColumn("trajectories of this batch"))
        self._stages: dict[str, Any] = {}
        self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live.is_started:
            self._live.stop()

    def stage(self, stage: str, done: int, total: int) -> None:
        """Trajectories of the current batch that are through a stage."""
        if stage not in self._stages:
            self._stages[stage] = self._stage_bars.add_task(stage)
        self._stage_bars.update(self._stages[stage], completed=done, total=total)

    def training(self) -> None:
        """The first rollout batch begins: the expected end counts from here."""
        self.training_started = time.monotonic()
        self._run_bar.start_task(self._run)

    def batch(self, metrics: dict[str, float]) -> None:
        """A rollout batch is through; `metrics` as in deploy/monitoring/metrics.py."""
        self.metrics = metrics
        done = int(metrics["batch"]) + 1
        now = time.monotonic()
        started, before = self.first or (self.training_started, done - 1)
        self.first = self.first or (now, done)
        self._run_bar.update(self._run, completed=done)
        if not self.console.is_terminal:
            per_batch = (now - started) / (done - before)  # from the second on without the first, which compiles
            rates = "  ".join(f"{s} {metrics[f'{s}/tokens_per_second']:.0f} tok/s" for s in _STAGES[:3])
            left = timedelta(seconds=round(per_batch * (self.total - done)))
            times = f"{metrics['seconds/batch']:.2f} s  left {left}"
            self.console.print(
                f"batch {done}/{self.total}  {self._headline()}  {rates}  {times}",
                soft_wrap=True,
                highlight=False,
            )

    def note(self, text: str) -> None:
        """What happens now; stays visible in a terminal's scroll-back too."""
        self.console.print(Text.assemble((f"{time.monotonic() - self.started:7.1f} s", "dim"), f"  {text}"))

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
        for stage in _STAGES:
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
