"""A sweep's results for people: the table on the console and the Pareto plot."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from deploy.evaluation.sweep import Row

_WIDE = 110  # characters from which on a metric and its deviation share a line
_COLUMNS = {  # metric: (heading, factor, format)
    "exact_match": ("accuracy\n%", 100, ".1f"),
    "tokens_per_step": ("tokens\n/step", 1, ".2f"),
    "forwards_per_token": ("forw.\n/token", 1, ".2f"),
    "forwards_per_token_with_commits": ("with\ncommits", 1, ".2f"),
    "tokens_per_second": ("tokens\n/s", 1, ".0f"),
    "response_tokens_mean": ("length", 1, ".1f"),
    "share_ended": ("ended\n%", 100, ".1f"),
}
# what the number beside a point means
_PARAMETERS = {
    "dynamic": "threshold",
    "static": "tokens a step",
    "sequential": "tokens a step",
    "entropy": "nats a step",
}


def table(rows: list[Row], width: int) -> Table:
    """One row per setting, mean ± standard deviation; fits 80 columns by breaking before the ±."""
    padding = (0, 1) if width >= _WIDE else (0, 0)
    result = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=padding)
    result.caption, result.caption_justify = caption(rows), "left"
    for heading in ("model", "decoding", "block"):
        result.add_column(heading, justify="right" if heading == "block" else "left", no_wrap=True)
    for heading, _, _ in _COLUMNS.values():
        result.add_column(heading, justify="right", no_wrap=True)
    gap = " " if width >= _WIDE else "\n"
    for row in rows:
        cells = []
        for name, (_, factor, form) in _COLUMNS.items():
            mean = f"{factor * row.mean[name]:{form}}"
            cells.append(f"{mean}{gap}±{factor * row.std[name]:{form}}" if name in row.std else mean)
        result.add_row(row.model, row.decoding, str(row.block_size or "-"), *cells)
    return result


def caption(rows: list[Row]) -> str:
    """What the deviations are over."""
    first = rows[0]
    if first.spread == "seeds":
        return f"± standard deviation over {len(first.runs)} seeds; {first.mean['problems']:.0f} problems"
    return f"one run; ± standard deviation over resamples of the {first.mean['problems']:.0f} problems (bootstrap)"


def pareto_front(rows: list[Row]) -> list[Row]:
    """Rows that no other row beats: in the order of falling tokens per step, each the most accurate so far."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda r: (-r.mean["tokens_per_step"], -r.mean["exact_match"])):
        if not front or row.mean["exact_match"] > front[-1].mean["exact_match"]:
            front.append(row)
    return front


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Accuracy against tokens per step as PNG: one colour per block size, one marker per rule, the front dashed."""
    from matplotlib.figure import Figure  # slow to import, and not needed without a plot

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    sizes = sorted({row.block_size for row in rows if row.block_size})
    colours = {size: f"C{i}" for i, size in enumerate(sizes)}
    markers = {"static": "s", "dynamic": "o", "sequential": "^", "entropy": "D", "AR": "*"}

    def series(row: Row) -> tuple[int, str]:
        return row.block_size or 0, row.decoding.split()[0]

    for (size, rule), group in groupby(sorted(rows, key=series), key=series):
        members = sorted(group, key=lambda r: r.mean["tokens_per_step"])
        x = [r.mean["tokens_per_step"] for r in members]
        y = [100 * r.mean["exact_match"] for r in members]
        axes.errorbar(
            x,
            y,
            xerr=[r.std["tokens_per_step"] for r in members],
            yerr=[100 * r.std["exact_match"] for r in members],
            label=f"block {size}, {rule} ({_PARAMETERS[rule]})" if size else "autoregressive teacher",
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
        [r.mean["tokens_per_step"] for r in front],
        [100 * r.mean["exact_match"] for r in front],
        color="0.6",
        linestyle="--",
        linewidth=3,
        alpha=0.6,
        zorder=1,
        label="Pareto front",
    )
    axes.set(xlabel="tokens per step (response tokens / denoising forwards)", ylabel="accuracy, %", title=title)
    axes.grid(alpha=0.3)
    axes.margins(0.08)
    axes.legend(fontsize=8, loc="best")
    axes.text(1, -0.16, caption(rows), transform=axes.transAxes, ha="right", fontsize=7, color="0.4")
    figure.savefig(path)
