"""The report of an ablation: tables, curves, and a verdict on every claim, from the runs' own files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from common.config.run import RunConfig
from deploy.ablation.config import AblationConfig, ArmConfig, Claim, EvaluateConfig
from deploy.ablation.runs import Arm
from deploy.ablation.suites import SuiteScores, read_suites

_SIGNIFICANT = 0.05
_LOWER_IS_BETTER = ("loss", "held_out_kl")


@dataclass(frozen=True)
class Result:
    """The results of one finished run; `static` and `dynamic` are empty where no problems were evaluated, `suites`
    (see `read_suites`) where none were yet."""

    arm: str
    seed: int
    static: dict[str, float]
    dynamic: dict[str, float]
    train: dict[str, float]
    versions: dict[str, str]
    curve: list[tuple[float, float]]  # response tokens trained on, exact match (dynamic) or else the held-out KL
    held_out_kl: float | None = None
    held_out_accepted: float | None = None
    suites: SuiteScores = field(default_factory=dict)

    def metric(self, name: str) -> float:
        """Exact match under `static` or `dynamic` decoding, `loss`: the first minus the second, `held_out_kl`,
        `held_out_accepted`, or of a suite `SUITE static`, `SUITE dynamic` (its score), `SUITE tokens_per_step`
        (dynamic) or `SUITE original`; NaN: not measured."""
        suite, _, what = name.rpartition(" ")
        if suite:
            rule, column = ("dynamic", what) if what == "tokens_per_step" else (what, "score")
            value = self.suites.get(suite, {}).get(rule, {}).get(column)
            return math.nan if value is None else value
        exact = {
            key: row.get("exact_match", math.nan) for key, row in (("static", self.static), ("dynamic", self.dynamic))
        }
        held_out = {"held_out_kl": self.held_out_kl, "held_out_accepted": self.held_out_accepted}
        measured = {key: math.nan if value is None else value for key, value in held_out.items()}
        return (exact | {"loss": exact["static"] - exact["dynamic"]} | measured)[name]


@dataclass(frozen=True)
class Verdict:
    """A claim's difference over the seeds that both arms have, in favour of the claim, and its standard deviation.

    `p` is of the paired t-test, `corrected` the same after Holm's correction for all claims; all NaN below two seeds.
    """

    mean: float
    std: float
    p: float
    corrected: float
    seeds: int
    word: str


def read_result(arm: Arm) -> Result:
    folder = arm.config.run_dir
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    student = summary.get("student", {"static": {}, "dynamic": {}})
    drawn = "eval/exact_match" if student["static"] else "eval/held_out_kl"
    return Result(
        arm=arm.name,
        seed=arm.seed,
        static=student["static"],
        dynamic=student["dynamic"],
        train=summary["train"],
        versions=summary.get("versions", {}),
        curve=[(r["response_tokens"], r[drawn]) for r in rows if r.get(drawn) is not None],
        held_out_kl=summary.get("held_out_kl", {}).get("mean"),
        held_out_accepted=summary.get("held_out_kl", {}).get("accepted"),
        suites=read_suites(folder) if arm.evaluate and arm.evaluated else {},
    )


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
    measured = "Exact match" if _has_problems(results) else "Held-out KL"
    config = runs[0].config
    batches, rows = config.pipeline.max_batches, config.rollout.prompts_per_batch * config.rollout.samples_per_prompt
    lines = [
        f"# Evidence: {ablation.name}",
        "",
        f"Made by `opdlm ablate {source}` from {len(results)} of {len(runs)} runs "
        f"(seeds {', '.join(map(str, ablation.seeds))}). Written by the command; do not edit.",
        "",
        f"Every arm starts from the same model ({Path(config.model.path).name}) and trains on the same prompts in the "
        f"same order, {batches} batches of {rows} responses, "
        f"{-(-rows // config.learner.batch_rows)} updates each. {_measures(results, config)}"
        f"{_suites_measured(results, ablation.evaluate)}Metrics are mean ± "
        "standard deviation over seeds.",
        "",
        "## Results",
        "",
        *_table(results, ablation),
        "",
        f"![{measured} at the end]({bars.relative_to(ablation.report.parent)})",
        "",
        f"![{measured} against training tokens]({curves.relative_to(ablation.report.parent)})",
        "",
        "## Claims",
        "",
        "The difference is paired by seed; p is of a two-sided paired t-test over the seeds, which with few seeds "
        "finds large effects only. *Reproduces* and *contradicted* need p < 0.05 after Holm's correction (1979) for "
        "the number of claims.",
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


def _has_problems(results: list[Result]) -> bool:
    return bool(results[0].static)


def _measures(results: list[Result], config: RunConfig) -> str:
    """What was measured, in sentences."""
    said = ""
    if _has_problems(results):
        said += (
            f"Exact match is on {int(results[0].static['problems'])} held-out problems, greedy; dynamic decoding "
            f"reveals what is surer than {config.evaluation.threshold:g}. "
        )
    if config.evaluation.held_out_prompts:
        said += (
            f"The held-out KL is on the original's responses to {config.evaluation.held_out_prompts} held-out prompts, "
            "with each block masked whole. "
        )
    return said


def _suites_measured(results: list[Result], evaluate: EvaluateConfig | None) -> str:
    """What the suites measured, in a sentence."""
    if evaluate is None or not (names := _suite_names(results)):
        return ""
    counts = (max(int(row["problems"] or 0) for r in results for row in r.suites.get(n, {}).values()) for n in names)
    said = ", ".join(f"{name} ({count} problems)" for name, count in zip(names, counts, strict=True))
    return (
        f"After training, each final model decodes {said} greedily; columns have the suite's own score, and dynamic "
        f"decoding reveals what is surer than {evaluate.threshold:g}. "
    )


def _suite_names(results: list[Result]) -> list[str]:
    return list(dict.fromkeys(name for r in results for name in r.suites))


def verdicts(results: list[Result], claims: Sequence[Claim]) -> list[Verdict]:
    """What the results say about each claim."""
    tested = [_tested(results, claim) for claim in claims]
    corrected = holm([p for _, _, p, _ in tested])
    return [
        Verdict(mean, std, p, of_all, seeds, _word(mean, of_all))
        for (mean, std, p, seeds), of_all in zip(tested, corrected, strict=True)
    ]


def holm(p: Sequence[float]) -> list[float]:
    """p-values after Holm's step-down correction (1979); NaN is no test, and stays."""
    corrected, largest = list(p), 0.0
    tests = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    for rank, (value, i) in enumerate(tests):
        largest = max(largest, min(1.0, (len(tests) - rank) * value))
        corrected[i] = largest
    return corrected


def _tested(results: list[Result], claim: Claim) -> tuple[float, float, float, int]:
    """Mean difference in favour of the claim, its standard deviation, p of the paired t-test, and seeds."""
    sign = -1 if claim.metric in _LOWER_IS_BETTER else 1
    better, worse = (
        {r.seed: r.metric(claim.metric) for r in results if r.arm == a} for a in (claim.better, claim.worse)
    )
    differences = np.array([sign * (better[s] - worse[s]) for s in sorted(better.keys() & worse.keys())])
    differences = differences[~np.isnan(differences)]
    if len(differences) < 2:
        return math.nan, math.nan, math.nan, len(differences)
    mean, std = float(differences.mean()), float(differences.std(ddof=1))
    p = float(stats.ttest_1samp(differences, 0).pvalue) if std > 0 else (0.0 if mean else 1.0)
    return mean, std, p, len(differences)


def _word(mean: float, p: float) -> str:
    if math.isnan(p):
        return "open"
    if p >= _SIGNIFICANT:
        return "in its direction, not significant" if mean > 0 else "not seen"
    return "reproduces" if mean > 0 else "contradicted"


def _table(results: list[Result], ablation: AblationConfig) -> list[str]:
    columns: list[tuple[str, Callable[[Result], float], str]] = []
    if _has_problems(results):
        columns += [
            ("static, %", lambda r: 100 * r.metric("static"), ".1f"),
            ("dynamic, %", lambda r: 100 * r.metric("dynamic"), ".1f"),
            ("loss under dynamic, points", lambda r: 100 * r.metric("loss"), ".1f"),
            ("tokens/step, dynamic", lambda r: r.dynamic["tokens_per_step"], ".2f"),
        ]
    if any(r.held_out_kl is not None for r in results):
        columns.append(("held-out KL, nats", lambda r: r.metric("held_out_kl"), ".3f"))
    if any(claim.metric == "held_out_accepted" for claim in ablation.claims):
        columns.append(("drafts kept, %", lambda r: 100 * r.metric("held_out_accepted"), ".1f"))
    columns += [column for name in _suite_names(results) for column in _suite_columns(name)]
    columns += [
        ("training tokens", lambda r: r.train["response_tokens"], ",.0f"),
        ("updates", lambda r: r.train["updates"], ",.0f"),
        ("minutes", lambda r: r.train["seconds"] / 60, ".1f"),
    ]
    lines = [
        "| arm | seeds | " + " | ".join(name for name, _, _ in columns) + " |",
        "| --- |" + " ---: |" * (len(columns) + 1),
    ]
    for arm in ablation.arms:
        of_arm = [r for r in results if r.arm == arm]
        if of_arm:
            cells = [_mean_std([value(r) for r in of_arm], form) for _, value, form in columns]
            lines.append(f"| {arm} | {len(of_arm)} | " + " | ".join(cells) + " |")
    originals = {
        f"{name} static, %": 100 * r.metric(f"{name} original")  # in this column alone: it is decoded in one way
        for r in results
        for name in r.suites
        if "original" in r.suites[name]
    }
    if originals:
        cells = [_mean_std([originals.get(name, math.nan)], form) for name, _, form in columns]
        lines.append("| the original, token by token | - | " + " | ".join(cells) + " |")
    return lines


def _suite_columns(suite: str) -> list[tuple[str, Callable[[Result], float], str]]:
    return [
        (f"{suite} static, %", lambda r: 100 * r.metric(f"{suite} static"), ".1f"),
        (f"{suite} dynamic, %", lambda r: 100 * r.metric(f"{suite} dynamic"), ".1f"),
        (f"{suite} tokens/step, dynamic", lambda r: r.metric(f"{suite} tokens_per_step"), ".2f"),
    ]


def _mean_std(values: list[float], form: str) -> str:
    """Of the values that were measured; "-": none was."""
    if not (values := [value for value in values if not math.isnan(value)]):
        return "-"
    mean = f"{np.mean(values):{form}}"
    return f"{mean} ± {np.std(values, ddof=1):{form}}" if len(values) > 1 and np.std(values) > 0 else mean


def _claims(results: list[Result], claims: tuple[Claim, ...]) -> list[str]:
    lines = [
        "| claim | measured by | difference | p | p, corrected | seeds | verdict |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for claim, found in zip(claims, verdicts(results, claims), strict=True):
        named = {
            "loss": "less lost from static to dynamic",
            "held_out_kl": "held-out KL",
            "held_out_accepted": "drafts kept on held-out prompts",
        }
        measure = claim.metric.replace("_", " ") if claim.suite else f"{claim.metric} exact match"
        measure = named.get(claim.metric, measure)
        scale, form, unit = (1, ".3f", "nats") if claim.metric == "held_out_kl" else (100, ".1f", "points")
        if claim.metric.endswith(" tokens_per_step"):
            scale, form, unit = 1, ".2f", "tokens"
        lines.append(
            f"| {claim.text} | {measure}: {claim.better} against {claim.worse} "
            + (
                f"| {scale * found.mean:+{form}} ± {scale * found.std:{form}} {unit} | {found.p:.3f} "
                f"| {found.corrected:.3f} "
                if found.seeds > 1
                else "| - | - | - "
            )
            + f"| {found.seeds} | **{found.word}** |"
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
    """Exact match under dynamic decoding, or else the held-out KL, against response tokens: mean over seeds and a band
    of one standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes: Any = figure.add_subplot()
    scale, label = (100, "exact match, dynamic decoding, %") if _has_problems(results) else (1, "held-out KL, nats")
    for i, (arm, config) in enumerate(arms.items()):
        color = config.style.color or f"C{i}"
        curves = [r.curve for r in results if r.arm == arm and r.curve]
        if not curves:
            continue
        points = min(map(len, curves))
        x = np.mean([[p[0] for p in c[:points]] for c in curves], axis=0) / 1e3
        y = scale * np.array([[p[1] for p in c[:points]] for c in curves])
        axes.plot(x, y.mean(axis=0), linestyle=config.style.line, color=color, label=arm, marker="o", markersize=3)
        if len(curves) > 1:
            axes.fill_between(x, y.mean(axis=0) - y.std(axis=0, ddof=1), y.mean(axis=0) + y.std(axis=0, ddof=1),
                              color=color, alpha=0.12, linewidth=0)  # fmt: skip
    axes.set(xlabel="response tokens trained on, thousands", ylabel=label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def plot_final(results: list[Result], arms: list[str], path: Path) -> None:
    """Exact match of every arm under static and dynamic decoding, or else its held-out KL, one dot per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.55 * len(arms) + 1.2), dpi=150, layout="constrained")
    axes: Any = figure.add_subplot()
    exact = _has_problems(results)
    drawn = [(0.2, "static", "C0"), (-0.2, "dynamic", "C1")] if exact else [(0.0, "held_out_kl", "C0")]
    for shift, name, colour in drawn:
        label: str | None = name
        for i, arm in enumerate(arms):
            values = [(100 if exact else 1) * r.metric(name) for r in results if r.arm == arm]
            if values:
                y = len(arms) - 1 - i + shift
                axes.barh(y, np.mean(values), height=0.36, color=colour, alpha=0.55, label=label)
                label = None
                axes.plot(values, [y] * len(values), "o", color=colour, markersize=4, markeredgecolor="white")
    axes.set_yticks(range(len(arms)), reversed(arms))
    axes.set(xlabel="exact match, %", xlim=(0, 100)) if exact else axes.set(xlabel="held-out KL, nats")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path)
