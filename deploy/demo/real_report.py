"""The report of `make real`: a table on the console, the results as JSON, the curves, and the page docs/real-model.md.

The page's generated parts stand between `<!-- begin NAME -->` and `<!-- end NAME -->`. They are made from the JSON
alone, which docs/benchmarks/real.json keeps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.demo.real_results import ENOUGH_TOKENS_PER_STEP, results_of
from deploy.files import replace_text

# what the student should reach
STATIC_POINTS, DYNAMIC_POINTS, LENGTH_SHARE = 1.5, 2.0, 0.1
_MARKED = re.compile(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->", re.DOTALL)
_MOST_CHARACTERS = 1200  # of a response that is shown
Results = dict[str, Any]


def write(folder: Path, run_dir: Path, docs: Path | None) -> None:
    """`real.json` and `real.png` in the folder, the parts of the page on the console; with `docs` its page too."""
    results = results_of(folder, run_dir)
    _write_json(results, folder / "real.json")
    plot(results, folder / "real.png")
    made = parts(results)
    for name in ("training", "long", "bars", "results"):
        if name in made:
            print(f"\n{made[name]}", flush=True)
    print(f"\nresults: {folder / 'real.json'}, curves: {folder / 'real.png'}", flush=True)
    if docs:
        _write_json(results, docs / "benchmarks" / "real.json")
        plot(results, docs / "images" / "real-curves.png")
        file = docs / "real-model.md"
        replace_text(file, page(file.read_text(), results))
        print(f"page: {file}", flush=True)


def page(text: str, results: Results) -> str:
    """The page with its generated parts replaced; those that the results have nothing for stay as they are."""
    made = parts(results)
    return _MARKED.sub(lambda m: f"<!-- begin {m[1]} -->\n{made[m[1]]}\n<!-- end {m[1]} -->" if m[1] in made else m[0],
                       text)  # fmt: skip


def parts(results: Results) -> dict[str, str]:
    """Markdown by the marker's name."""
    found = {"training": _training(results), "curves": "![training curves](images/real-curves.png)"}
    if "rows" in results:
        found["results"] = _evaluation(results["rows"])
    if all("ifeval" in results.get(name, {}) for name in ("ar", "static", "dynamic")):
        found["bars"] = _bars(results)
    if "long" in results:
        found["long"] = _long(results["long"])
        found["examples"] = _examples(results["long"]["examples"])
    return found


def _training(results: Results) -> str:
    rows = [
        ["training", "value"],
        ["response tokens", f"{results['response_tokens']:,.0f}"],
        ["rollout batches, updates", f"{results['batches']:,}, {results['updates']:,.0f}"],
        ["GPU minutes", f"{results['gpu_minutes']:.1f}"],
        ["wall time of the batches, minutes", f"{results['seconds'] / 60:.1f}"],
        ["FLOPs of learner and teacher", f"{results['flops/learner'] + results['flops/teacher']:.2e}"],
        ["KL to the original, mean of the last batches, nats per token", f"{results['kl']:.3f}"],
    ]
    if results["held_out_kl"] is not None:
        rows.append(["held-out KL before, nats per token", _number(results["held_out_kl_before"], ".3f")])
        rows.append(["held-out KL after", f"{results['held_out_kl']:.3f}"])
    if results["held_out_kl_by_offset"]:
        by_offset = ", ".join(_number(value, ".3f") for value in results["held_out_kl_by_offset"])
        rows.append(["held-out KL after, by offset in the block", by_offset])
    return _table(rows, right=(1,))


def _evaluation(rows: Sequence[dict[str, Any]]) -> str:
    lines = [["suite", "model", "decoding", "score %, 95%", "minus AR, 95%", "tokens per step"]]
    lines[0] += ["forwards per token", "tokens/s", "length", "ended %"]
    for row in rows:
        line = [row["suite"], row["model"], row["decoding"], _with_interval(row["score"], row["interval"], ".1f")]
        line.append(_difference(row["difference"]))
        line += [_number(row["tokens_per_step"], ".2f"), _number(row["forwards_per_token_with_commits"], ".2f")]
        line += [_number(row["tokens_per_second"], ",.0f"), _number(row["response_tokens_mean"], ".0f")]
        lines.append([*line, _number(row["ended"], ".1f")])
    notes = [
        f"{row['unchecked']} instructions a row could not be checked: NLTK's data is missing."
        for row in rows
        if row.get("unchecked")
    ]
    return "\n".join([_table(lines, right=range(3, 10)), *(["", notes[0]] if notes else [])])


def _bars(results: Results) -> str:
    """What the student should reach on IFEval, and what it reaches."""
    ar, static, dynamic = (results[name] for name in ("ar", "static", "dynamic"))
    below, lost = static["ifeval"] - ar["ifeval"], dynamic["ifeval"] - static["ifeval"]
    fast = dynamic["tokens_per_step"] >= ENOUGH_TOKENS_PER_STEP
    rows = [
        ["on IFEval", "wanted", "measured", "reached"],
        [
            "static minus AR, points, 95%",
            f"at least -{STATIC_POINTS}",
            _difference(static["minus_ar"]),
            _yes(below >= -STATIC_POINTS),
        ],
        [
            f"{dynamic['decoding']} minus static, points",
            f"at least -{DYNAMIC_POINTS}, at {ENOUGH_TOKENS_PER_STEP} tokens per step or more",
            f"{lost:+.1f}, at {dynamic['tokens_per_step']:.2f}",
            _yes(fast and lost >= -DYNAMIC_POINTS),
        ],
    ]
    for name, what in (("response_tokens_mean", "response length"), ("ended", "share of ended responses")):
        ratios = [each[name] / ar[name] if ar[name] else float("nan") for each in (static, dynamic)]
        rows.append(
            [
                f"{what}, of AR's: static, {dynamic['decoding']}",
                f"within {LENGTH_SHARE:.0%}",
                ", ".join(f"{ratio:.2f}" for ratio in ratios),
                _yes(all(abs(ratio - 1) <= LENGTH_SHARE for ratio in ratios)),
            ]
        )
    return _table(rows, right=())


def _yes(reached: bool) -> str:
    return "yes" if reached else "**no**"


def _long(found: dict[str, Any]) -> str:
    lines = [["model", "decoding", "responses", "ended %", "mean length", "median length"]]
    lines[0] += ["repeated 4-grams %", "end in a loop %"]
    for row in found["rows"]:
        line = [row["model"], row["decoding"], f"{row['responses']}", f"{row['ended']:.1f}"]
        line += [f"{row['tokens_mean']:.0f}", f"{row['tokens_median']:.0f}"]
        lines.append([*line, f"{row['repeated_4grams']:.1f}", f"{row['in_a_loop']:.1f}"])
    return f"Up to {found['max_new_tokens']:,} tokens.\n\n{_table(lines, right=range(2, 8))}"


def _examples(examples: Sequence[dict[str, Any]]) -> str:
    """Each prompt with the responses in the columns of one table row; long ones are cut."""
    blocks = []
    for example in examples:
        names = list(example["responses"])
        blocks.append(f"**Prompt.** {_cell(example['question'])}\n\n" + _table(
            [names, [_cell(example["responses"][name]) for name in names]], right=()
        ))  # fmt: skip
    return "\n\n".join(blocks)


def _cell(text: str) -> str:
    """A text that stands in one cell: no line breaks, nothing that Markdown or HTML would take for its own."""
    shown = text.strip()
    if len(shown) > _MOST_CHARACTERS:
        shown = f"{shown[:_MOST_CHARACTERS].rstrip()} [...]"
    shown = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", shown).replace("\n", "<br>")


def _with_interval(value: float | None, interval: Sequence[float] | None, form: str) -> str:
    if value is None or interval is None:
        return "-"
    return f"{value:{form}} ({interval[0]:{form}} to {interval[1]:{form}})"


def _difference(found: tuple[float, Sequence[float]] | None) -> str:
    return _with_interval(found[0], found[1], "+.1f") if found else ""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _table(rows: list[list[str]], right: Any) -> str:
    ruler = ["---:" if i in right else "---" for i in range(len(rows[0]))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ruler, *rows[1:]])


def _write_json(results: Results, path: Path) -> None:
    """A line for each row and point, so that a new run is a readable difference."""
    lines = []
    for name, value in results.items():
        if isinstance(value, list) and value:
            inner = ",\n  ".join(json.dumps(item) for item in value)
            lines.append(f" {json.dumps(name)}: [\n  {inner}\n ]")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    replace_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def plot(results: Results, path: Path) -> None:
    """KL, IFEval and tokens per step against response tokens, one above the other, as PNG."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(8, 9), dpi=150, layout="constrained")
    axes: Any = figure.subplots(3, 1, sharex=True)
    curve = results["curve"]
    _line(axes[0], curve, "kl", "training, rollouts", "C0", linewidth=1)
    _line(axes[0], curve, "held_out_kl", "held out", "C1", marker="o", markersize=4)
    axes[0].set(ylabel="KL to the original, nats per token")
    axes[0].set_ylim(bottom=0)
    for i, name in enumerate(name for name in ("static 1", "dynamic 0.9") if results["ifeval_at"]):
        _line(axes[1], results["ifeval_at"], name, f"student, {name}", f"C{i}", marker="o", markersize=4)
    for name, style in (("ar", "--"), ("static", ":"), ("dynamic", "-.")):
        if (score := results.get(name, {}).get("ifeval")) is not None:
            label = f"{'original' if name == 'ar' else 'student at the end'}, {results[name]['decoding']}"
            axes[1].axhline(score, color="0.4", linestyle=style, linewidth=1, label=label)
    axes[1].set(ylabel="IFEval, instructions, %")
    _line(axes[2], curve, "tokens_per_step", "training, rollouts", "C0", linewidth=1)
    axes[2].set(ylabel="tokens per step", xlabel="response tokens trained on, millions")
    for each in axes:
        each.grid(alpha=0.3)
        if each.get_legend_handles_labels()[1]:
            each.legend(fontsize=8)
    figure.savefig(path)


def _line(axes: Any, points: Sequence[dict[str, Any]], name: str, label: str, color: str, **style: Any) -> None:
    known = [(point["response_tokens"] / 1e6, point[name]) for point in points if point.get(name) is not None]
    if known:
        axes.plot(*zip(*known, strict=True), label=label, color=color, **style)
