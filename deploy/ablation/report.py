"""The report of an ablation: tables, curves, and a verdict on every claim, from the runs' own files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from deploy.ablation.config import AblationConfig, ArmConfig, Claim
from deploy.ablation.runs import Arm

_SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Result:
    """The results of one finished run."""

    arm: str
    seed: int
    static: dict[str, float]
    dynamic: dict[str, float]
    train: dict[str, float]
    versions: dict[str, str]
    curve: list[tuple[float, float]]  # response tokens trained on, exact match under dynamic decoding

    def metric(self, name: str) -> float:
        """Exact match under `static` or `dynamic` decoding, or `loss`: the first minus the second."""
        metrics = {"static": self.static["exact_match"], "dynamic": self.dynamic["exact_match"]}
        return metrics["static"] - metrics["dynamic"] if name == "loss" else metrics[name]


def read_result(arm: Arm) -> Result:
    folder = arm.config.run_dir
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(r["response_tokens"], r["eval/exact_match"]) for r in rows if r.get("eval/exact_match") is not None]
    student = summary["student"]
    versions = summary.get("versions", {})
    return Result(arm.name, arm.seed, student["static"], student["dynamic"], summary["train"], versions, curve)


def write_report(ablation: AblationConfig, runs: list[Arm], source: str) -> None:
    """Write the report (Markdown), its plots, and the results of every run (JSON), from the runs that are finished."""
    results = [read_result(arm) for arm in runs if arm.done]
    raw = ablation.report.parent / "benchmarks" / f"{ablation.name}.json"
    raw.parent.mkdir(parents=True, exist_ok=True)
    raw.write_text("[\n" + ",\n".join(json.dumps(asdict(result)) for result in results) + "\n]\n")
    images = ablation.report.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    curves, bars = images / f"{ablation.name}-curves.png", images / f"{ablation.name}-final.png"
    plot_curves(results, ablation.arms, curves)
    plot_final(results, list(ablation.arms), bars)
    config = runs[0].config
    batches, rows = config.pipeline.max_batches, config.rollout.prompts_per_batch * config.rollout.samples_per_prompt
    problems = int(results[0].static["problems"])
    lines = [
        f"# Evidence: {ablation.name}",
        "",
        f"Made by `opdlm ablate {source}` from {len(results)} of {len(runs)} runs "
        f"(seeds {', '.join(map(str, ablation.seeds))}). Written by the command; do not edit.",
        "",
        f"Every arm starts from the same model ({Path(config.model.path).name}) and trains on the same prompts in the "
        f"same order, {batches} batches of {rows} responses, "
        f"{-(-rows // config.learner.batch_rows)} updates each. Exact match is on {problems} held-out problems, "
        "greedy; dynamic decoding reveals what is surer than "
        f"{config.evaluation.threshold:g}. Metrics are mean ± standard deviation over seeds.",
        "",
        "## Results",
        "",
        *_table(results, list(ablation.arms)),
        "",
        f"![Exact match at the end]({bars.relative_to(ablation.report.parent)})",
        "",
        f"![Exact match against training tokens]({curves.relative_to(ablation.report.parent)})",
        "",
        "## Claims",
        "",
        "The difference is paired by seed; p is of a two-sided paired t-test over the seeds, which with few seeds "
        "finds large effects only. *Reproduces* and *contradicted* need p < 0.05.",
        "",
        *_claims(results, ablation.claims),
        "",
        *(["## Reading", "", ablation.reading.strip(), ""] if ablation.reading else []),
        "## Made with",
        "",
        f"What every run gave: [{raw.name}]({raw.relative_to(ablation.report.parent)}).",
        "",
        *_versions(results),
    ]
    ablation.report.write_text("\n".join(lines) + "\n")


def verdict(results: list[Result], claim: Claim) -> tuple[float, float, float, int, str]:
    """Mean difference in favour of the claim, its standard deviation, p, seeds, and the verdict in words."""
    sign = -1 if claim.metric == "loss" else 1
    better, worse = (
        {r.seed: r.metric(claim.metric) for r in results if r.arm == a} for a in (claim.better, claim.worse)
    )
    seeds = sorted(better.keys() & worse.keys())
    differences = np.array([sign * (better[s] - worse[s]) for s in seeds])
    if len(seeds) < 2:
        return float("nan"), float("nan"), float("nan"), len(seeds), "open"
    mean, std = float(differences.mean()), float(differences.std(ddof=1))
    p = float(stats.ttest_1samp(differences, 0).pvalue) if std > 0 else (0.0 if mean else 1.0)
    if p >= _SIGNIFICANT:
        word = "in its direction, not significant" if mean > 0 else "not seen"
    else:
        word = "reproduces" if mean > 0 else "contradicted"
    return mean, std, p, len(seeds), word


def _table(results: list[Result], arms: list[str]) -> list[str]:
    columns: list[tuple[str, Callable[[Result], float], str]] = [
        ("static, %", lambda r: 100 * r.metric("static"), ".1f"),
        ("dynamic, %", lambda r: 100 * r.metric("dynamic"), ".1f"),
        ("loss under dynamic, points", lambda r: 100 * r.metric("loss"), ".1f"),
        ("tokens/step, dynamic", lambda r: r.dynamic["tokens_per_step"], ".2f"),
        ("training tokens", lambda r: r.train["response_tokens"], ",.0f"),
        ("updates", lambda r: r.train["updates"], ",.0f"),
        ("minutes", lambda r: r.train["seconds"] / 60, ".1f"),
    ]
    lines = [
        "| arm | seeds | " + " | ".join(name for name, _, _ in columns) + " |",
        "| --- |" + " ---: |" * (len(columns) + 1),
    ]
    for arm in arms:
        of_arm = [r for r in results if r.arm == arm]
        if of_arm:
            cells = [_mean_std([value(r) for r in of_arm], form) for _, value, form in columns]
            lines.append(f"| {arm} | {len(of_arm)} | " + " | ".join(cells) + " |")
    return lines


def _mean_std(values: list[float], form: str) -> str:
    mean = f"{np.mean(values):{form}}"
    return f"{mean} ± {np.std(values, ddof=1):{form}}" if len(values) > 1 and np.std(values) > 0 else mean


def _claims(results: list[Result], claims: tuple[Claim, ...]) -> list[str]:
    lines = [
        "| claim | measured by | difference, points | p | seeds | verdict |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for claim in claims:
        mean, std, p, seeds, word = verdict(results, claim)
        measure = {"loss": "less lost from static to dynamic"}.get(claim.metric, f"{claim.metric} exact match")
        lines.append(
            f"| {claim.text} | {measure}: {claim.better} against {claim.worse} "
            + (f"| {100 * mean:+.1f} ± {100 * std:.1f} | {p:.3f} " if seeds > 1 else "| - | - ")
            + f"| {seeds} | **{word}** |"
        )
    return lines


def _versions(results: list[Result]) -> list[str]:
    """A line for every set of versions, with the seeds that it made."""
    makers: dict[str, set[int]] = {}
    for result in results:
        names = ", ".join(f"{name} {number}" for name, number in result.versions.items())
        makers.setdefault(names or "versions not recorded", set()).add(result.seed)
    return [f"- {names}: seeds {', '.join(map(str, sorted(seeds)))}" for names, seeds in makers.items()]


def plot_curves(results: list[Result], arms: dict[str, ArmConfig], path: Path) -> None:
    """Exact match under dynamic decoding against response tokens: mean over seeds, band of one standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes: Any = figure.add_subplot()
    for i, (arm, config) in enumerate(arms.items()):
        color = config.style.color or f"C{i}"
        curves = [r.curve for r in results if r.arm == arm and r.curve]
        if not curves:
            continue
        points = min(map(len, curves))
        x = np.mean([[p[0] for p in c[:points]] for c in curves], axis=0) / 1e3
        y = 100 * np.array([[p[1] for p in c[:points]] for c in curves])
        axes.plot(x, y.mean(axis=0), linestyle=config.style.line, color=color, label=arm, marker="o", markersize=3)
        if len(curves) > 1:
            axes.fill_between(x, y.mean(axis=0) - y.std(axis=0, ddof=1), y.mean(axis=0) + y.std(axis=0, ddof=1),
                              color=color, alpha=0.12, linewidth=0)  # fmt: skip
    axes.set(xlabel="response tokens trained on, thousands", ylabel="exact match, dynamic decoding, %")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def plot_final(results: list[Result], arms: list[str], path: Path) -> None:
    """Exact match of every arm under static and dynamic decoding, one dot per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.55 * len(arms) + 1.2), dpi=150, layout="constrained")
    axes: Any = figure.add_subplot()
    for shift, name, colour in ((0.2, "static", "C0"), (-0.2, "dynamic", "C1")):
        label: str | None = name
        for i, arm in enumerate(arms):
            values = [100 * r.metric(name) for r in results if r.arm == arm]
            if values:
                y = len(arms) - 1 - i + shift
                axes.barh(y, np.mean(values), height=0.36, color=colour, alpha=0.55, label=label)
                label = None
                axes.plot(values, [y] * len(values), "o", color=colour, markersize=4, markeredgecolor="white")
    axes.set_yticks(range(len(arms)), reversed(arms))
    axes.set(xlabel="exact match, %", xlim=(0, 100))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path)
