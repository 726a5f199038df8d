"""A sweep's results for people: a table for each suite on the console, and the Pareto plot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from deploy.evaluation.results import Metric, Row

_WIDE = 120  # characters from which on what belongs together shares a line
_COLUMNS = {  # metric: (heading, factor, format)
    "tokens_per_step": ("tokens\n/step", 1, ".2f"),
    "forwards_per_token_with_commits": ("forw.\n/tok.", 1, ".2f"),
    "tokens_per_second": ("tok.\n/s", 1, ".0f"),
    "response_tokens_mean": ("length", 1, ".1f"),
    "share_ended": ("ended\n%", 100, ".1f"),
}
_NAMES = {
    "exact_match": "right answers",
    "passed": "programs that pass",
    "instruction_strict": "instructions followed, strict",
    "instruction_loose": "instructions followed, loose",
    "prompt_strict": "prompts followed, strict",
    "prompt_loose": "prompts followed, loose",
}
# what the number beside a point means
_PARAMETERS = {
    "dynamic": "threshold",
    "static": "tokens a step",
    "sequential": "tokens a step",
    "entropy": "nats a step",
    "adaptive": "bounds of the threshold",
    "speculative": "rounds of a draft",
}


def tables(rows: Sequence[Row], width: int) -> list[Table]:
    """One table for each suite, a row for each setting; they fit 80 columns by breaking lines within cells."""
    return [_table(list(group), width) for _, group in groupby(rows, key=lambda row: row.suite)]


def _table(rows: list[Row], width: int) -> Table:
    gap = " " if width >= _WIDE else "\n"
    first = rows[0]
    result = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1) if width >= _WIDE else (0, 0))
    result.title = f"{first.suite}: {_NAMES[first.score]}, {first.problems:,} problems"
    result.caption = caption(rows)
    result.title_justify = result.caption_justify = "left"
    result.add_column("model", no_wrap=True)
    scores = [first.score, *[name for name in first.metrics if name.startswith("pass@")][-1:]]
    compared = any(row.metrics[first.score].difference for row in rows)
    for name in scores:
        heading = name if name != first.score else "score" if first.samples == 1 else f"avg@{first.samples}"
        result.add_column(f"{heading} %\n95%", justify="right", no_wrap=True)
    if compared:
        result.add_column("minus AR\n95%", justify="right", no_wrap=True)
    for heading, _, _ in _COLUMNS.values():
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [_score(row.metrics[name], gap) for name in scores]
        if compared:
            cells.append(_difference(row.metrics[first.score], gap))
        for name, (_, factor, form) in _COLUMNS.items():
            mean = row.metrics[name].mean
            cells.append("-" if mean is None else f"{factor * mean:{form}}")
        setting = [row.model, row.decoding, *([f"block {row.block_size}"] if row.block_size else [])]
        result.add_row(gap.join(setting), *cells)
    return result


def _score(metric: Metric, gap: str) -> str:
    """The mean, with the deviation where it is over seeds, and the interval."""
    if metric.mean is None or metric.interval is None:
        return "-"
    mean = f"{100 * metric.mean:.1f}"
    if len(metric.seeds) > 1 and metric.std is not None:
        mean += f"{gap}±{100 * metric.std:.1f}"
    low, high = metric.interval
    return f"{mean}{gap}{100 * low:.1f}-{100 * high:.1f}"


def _difference(metric: Metric, gap: str) -> str:
    if metric.difference is None:
        return ""
    mean, (low, high) = metric.difference
    return f"{100 * mean:+.1f}{gap}{100 * low:+.1f} {100 * high:+.1f}"


def caption(rows: Sequence[Row]) -> str:
    """What the deviations and intervals are of, and the further scores of a suite that has some."""
    first = rows[0]
    seeds = max(len(row.metrics[row.score].seeds) for row in rows)
    parts = [f"± standard deviation over {seeds} seeds"] if seeds > 1 else []
    parts.append("95%: interval over the choice of problems")
    if any(row.metrics[row.score].difference for row in rows):
        parts.append("minus AR: paired by problem")
    parts.append("forwards with commits")
    lines = ["; ".join(parts)]
    for other in [name for name in first.metrics if name in _NAMES and name != first.score]:
        lines.append(f"{_NAMES[other]}: " + ", ".join(f"{100 * row.mean(other):.1f}" for row in rows))
    if unchecked := max(row.facts.get("unchecked", 0) for row in rows):
        lines.append(f"{unchecked} instructions a row could not be checked: NLTK's data is missing")
    return "\n".join(lines)


def pareto_front(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other row beats: in the order of falling tokens per step, each the best so far."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda r: (-r.mean("tokens_per_step"), -r.mean(r.score))):
        if not front or row.mean(row.score) > front[-1].mean(row.score):
            front.append(row)
    return front


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Score against tokens per step as PNG, suites side by side: one colour per block size, one marker per rule, the
    front dashed."""
    from matplotlib.figure import Figure  # slow to import, and not needed without a plot

    suites = [list(group) for _, group in groupby(rows, key=lambda row: row.suite)]
    figure = Figure(figsize=(8 * len(suites), 5), dpi=150, layout="constrained")
    figure.suptitle(title)
    for place, of_suite in enumerate(suites, start=1):
        _plot_suite(figure.add_subplot(1, len(suites), place), of_suite)
    figure.savefig(path)


def _plot_suite(axes: Any, rows: list[Row]) -> None:
    sizes = sorted({row.block_size for row in rows if row.block_size})
    colours = {size: f"C{i}" for i, size in enumerate(sizes)}
    markers = {
        "static": "s",
        "dynamic": "o",
        "sequential": "^",
        "entropy": "D",
        "adaptive": "v",
        "speculative": "P",
        "AR": "*",
    }
    score = rows[0].score

    def series(row: Row) -> tuple[int, str]:
        return row.block_size or 0, row.decoding.split()[0]

    for (size, rule), group in groupby(sorted(rows, key=series), key=series):
        members = sorted(group, key=lambda r: r.mean("tokens_per_step"))
        x = [r.mean("tokens_per_step") for r in members]
        y = [100 * r.mean(score) for r in members]
        axes.errorbar(
            x,
            y,
            xerr=[r.metrics["tokens_per_step"].std or 0 for r in members],
            yerr=[100 * (r.metrics[score].std or 0) for r in members],
            label=f"block {size}, {rule} ({_PARAMETERS[rule]})" if size else "autoregressive original",
            color=colours.get(size, "black"),
            marker=markers[rule],
            markersize=13 if not size else 6,
            linewidth=1,
            elinewidth=0.7,
            capsize=2,
            zorder=3,
        )
        for row, at in zip(members, zip(x, y, strict=True), strict=True):
            if size:
                text = row.decoding.split()[1]
                axes.annotate(text, at, xytext=(5, 5), textcoords="offset points", fontsize=8, color=colours[size])
    front = pareto_front(rows)
    axes.plot(
        [r.mean("tokens_per_step") for r in front],
        [100 * r.mean(score) for r in front],
        color="0.6",
        linestyle="--",
        linewidth=3,
        alpha=0.6,
        zorder=1,
        label="Pareto front",
    )
    axes.set(xlabel="tokens per step (response tokens / denoising forwards)", ylabel=f"{_NAMES[score]}, %")
    seeds = len(rows[0].metrics[score].seeds)
    bars = (
        f"standard deviation over {seeds} seeds" if seeds > 1 else "standard deviation over resamples of the problems"
    )
    axes.set_title(f"{rows[0].suite}: {rows[0].problems} problems; bars: {bars}", fontsize=8)
    axes.grid(alpha=0.3)
    axes.margins(0.08)
    axes.legend(fontsize=8, loc="best")
