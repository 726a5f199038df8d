"""The results of a sweep: a row of metrics for each model and setting on each suite, and a record of every response."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from actors.evaluation.worker import ModelKind, ModelSpec
from deploy.evaluation import statistics
from deploy.evaluation.problems import SuiteProblems
from deploy.evaluation.scoring import SCORES, SOLVED, Score, score_all
from deploy.evaluation.statistics import DECODING, Counts, Interval
from deploy.evaluation.sweep import Progress, Run, Setting, Sweep

FORMAT_VERSION = 2


@dataclass(frozen=True)
class Metric:
    """A metric with its deviation, its 95% interval, and its difference from the original's with interval.

    None: nothing was counted, or there is nothing to compare with. `seeds`: the value of each seed.
    """

    mean: float | None
    std: float | None = None
    interval: Interval | None = None
    difference: tuple[float, Interval] | None = None
    seeds: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Row:
    """One model under one setting on one suite; `score` names the metric that is the suite's own.

    `facts` are counts that are no metric, such as instructions that could not be checked.
    """

    suite: str
    score: str
    model: ModelKind
    path: str
    decoding: str
    block_size: int | None
    unmasking: dict[str, Any] | None
    problems: int
    samples: int
    seconds: float
    metrics: dict[str, Metric]
    facts: dict[str, int]

    def mean(self, metric: str) -> float:
        """NaN where nothing was counted."""
        value = self.metrics[metric].mean
        return float("nan") if value is None else value


@dataclass(frozen=True)
class Scored:
    """The runs of one setting on one suite, one a seed, with the score of every response."""

    suite: SuiteProblems
    spec: ModelSpec
    setting: Setting
    runs: list[Run]
    scores: list[list[Score]]

    @classmethod
    def of(cls, suite: SuiteProblems, spec: ModelSpec, setting: Setting, runs: list[Run], progress: Progress) -> Scored:
        progress.begin(f"{suite.suite.name}, {setting.decoding}: scoring", sum(len(run.responses) for run in runs))
        scores = []
        for run in runs:
            problems = [suite.problems[r.ordinal] for r in run.responses]
            texts = [r.text for r in run.responses]
            scores.append(score_all(suite.suite, problems, texts, lambda: progress.advance(1)))
        return cls(suite, spec, setting, runs, scores)

    def counts(self) -> Counts:
        """The columns of all metrics; pass@k for k = 2, 4, 8 ... and all samples, where there are several."""
        shape = len(self.runs), len(self.suite.problems)
        columns: dict[str, np.ndarray] = {}
        kind = self.suite.suite.scorer
        at = np.array([[r.ordinal for r in run.responses] for run in self.runs])
        by_response: dict[str, list[list[float]]] = {
            "responses": [[1 for _ in run.responses] for run in self.runs],
            "tokens": [[len(r.ids) for r in run.responses] for run in self.runs],
            "denoise": [[r.denoise_forwards for r in run.responses] for run in self.runs],
            "forwards": [[r.denoise_forwards + r.commit_forwards for r in run.responses] for run in self.runs],
            "ended": [[r.ended for r in run.responses] for run in self.runs],
        }
        for name in SCORES[kind]:
            by_response[name] = [[score.ratios[name][0] for score in of_seed] for of_seed in self.scores]
            by_response[_of(name)] = [[score.ratios[name][1] for score in of_seed] for of_seed in self.scores]
        for name, values in by_response.items():
            columns[name] = np.zeros(shape)
            for seed, of_seed in enumerate(values):
                np.add.at(columns[name][seed], at[seed], of_seed)
        samples = len(self.runs[0].responses) // len(self.suite.problems)
        for k in powers(samples):
            known = columns[_of(SOLVED[kind])] == samples
            estimate = statistics.pass_at(k, columns[SOLVED[kind]], samples)
            columns[f"pass@{k}"], columns[_of(f"pass@{k}")] = estimate * known, known.astype(float)
        return Counts(columns)

    def facts(self) -> dict[str, int]:
        unchecked = sum(score.facts.get("unchecked", 0) for of_seed in self.scores for score in of_seed)
        return {"unchecked": unchecked} if self.suite.suite.scorer == "instructions" else {}

    def records(self) -> Iterator[dict[str, Any]]:
        """One JSON object for each response."""
        for seed, (run, scores) in enumerate(zip(self.runs, self.scores, strict=True)):
            for response, score in zip(run.responses, scores, strict=True):
                problem = self.suite.problems[response.ordinal]
                yield {
                    "suite": self.suite.suite.name,
                    "model": self.spec.kind,
                    "decoding": self.setting.decoding,
                    "block_size": self.setting.block_size,
                    "problem": problem.key,
                    "seed": seed,
                    "sample": response.sample,
                    "question": problem.question,
                    "reference": problem.reference,
                    "response": response.text,
                    "scores": score.ratios,
                    **score.facts,
                    "response_tokens": len(response.ids),
                    "denoise_forwards": response.denoise_forwards,
                    "commit_forwards": response.commit_forwards,
                    "finish_reason": response.finish_reason,
                }


def powers(samples: int) -> list[int]:
    """The k of pass@k: 2, 4, 8 ... and the number of samples; none for a single one."""
    doubled = [2**i for i in range(1, samples.bit_length()) if 2**i < samples]
    return [*doubled, samples] if samples > 1 else []


def rows_of(scored: Sequence[Scored]) -> list[Row]:
    """A row for each, in the same order; those of a suite's student are compared with its original, if it is there."""
    counts = [each.counts() for each in scored]
    originals = {
        each.suite.suite.name: own for each, own in zip(scored, counts, strict=True) if each.spec.kind == "original"
    }
    return [_row(each, own, originals.get(each.suite.suite.name)) for each, own in zip(scored, counts, strict=True)]


def _row(scored: Scored, counts: Counts, original: Counts | None) -> Row:
    kind = scored.suite.suite.scorer
    names = [*SCORES[kind], *(name for name in counts.columns if name.startswith("pass@") and "/" not in name)]
    compared = original if scored.spec.kind == "student" else None
    metrics = {name: _metric(counts, (name, _of(name)), compared) for name in names}
    metrics |= {name: _metric(counts, columns, compared) for name, columns in DECODING.items()}
    tokens = counts.columns["tokens"].sum(axis=1)
    speeds = tuple(float(t / max(run.seconds, 1e-9)) for t, run in zip(tokens, scored.runs, strict=True))
    metrics["tokens_per_second"] = Metric(float(np.mean(speeds)), seeds=speeds)
    if len(speeds) > 1:
        metrics["tokens_per_second"] = replace(metrics["tokens_per_second"], std=float(np.std(speeds, ddof=1)))
    return Row(
        suite=scored.suite.suite.name,
        score=SCORES[kind][0],
        model=scored.spec.kind,
        path=scored.spec.path,
        decoding=scored.setting.decoding,
        block_size=scored.setting.block_size,
        unmasking=scored.setting.unmasking.model_dump() if scored.setting.unmasking else None,
        problems=counts.problems,
        samples=len(scored.runs[0].responses) // counts.problems,
        seconds=sum(run.seconds for run in scored.runs),
        metrics=metrics,
        facts=scored.facts(),
    )


def _metric(counts: Counts, columns: tuple[str, str], original: Counts | None) -> Metric:
    seeds = tuple(statistics.by_seed(counts, columns))
    return Metric(
        statistics.mean_of(seeds),
        statistics.deviation(counts, columns),
        statistics.interval(counts, columns),
        statistics.difference(counts, original, columns) if original else None,
        seeds,
    )


def _of(score: str) -> str:
    """The column of a score's denominator."""
    return f"{score}/of"


def report(sweep: Sweep, facts: dict[str, Any]) -> dict[str, Any]:
    """The content of the results' JSON file without its rows; `facts` are further fields."""
    return {
        "format_version": FORMAT_VERSION,
        "suites": [
            {
                "name": suite.suite.name,
                "source": suite.source,
                "problems": len(suite.problems),
                "left_out": suite.left_out,
                "template": suite.template,
                "shots": suite.shots,
                "stop": suite.stop,
                "max_new_tokens": sweep.limit(suite),
                "less_room": suite.less_room(sweep.limit(suite), sweep.positions),
                "scorer": suite.suite.scorer,
                "answer_formats": suite.suite.answer_formats,
            }
            for suite in sweep.suites
        ],
        "temperature": sweep.temperature,
        "seeds": list(sweep.run_seeds),
        "samples": sweep.samples,
        "slots": sweep.slots,
        "dtype": sweep.dtype,
        **facts,
    }
