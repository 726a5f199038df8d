"""The suites of an ablation: every arm's final model on them, by a process of `opdlm eval` once its run is finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.config.run import RunConfig
from deploy.ablation.config import EvaluateConfig
from deploy.ablation.processes import Processes
from deploy.checkpoints import FINAL
from deploy.files import replace_text

# where they are found, how many at a time; whether the original is asked is recorded beside these
_NOT_OF_RESULTS = {"suite_data", "slots", "original"}
SuiteScores = dict[str, dict[str, dict[str, float | None]]]


def is_evaluated(folder: Path, evaluate: EvaluateConfig, original: bool, *, scored: bool = True) -> bool:
    """Whether a run's folder has results of these settings, with the original's where it is asked for; `scored`: not
    only responses that were kept without scores."""
    files = _Files(folder)
    if not files.record.is_file() or not (files.results.is_file() or (files.unscored.is_file() and not scored)):
        return False
    was = json.loads(files.record.read_text())
    return {**was, "original": True} == _made_with(evaluate, True) and (was["original"] or not original)


def evaluate_final(
    config: RunConfig, evaluate: EvaluateConfig, original: bool, processes: Processes, *, score: bool = True
) -> None:
    """Evaluate the final model of a run; what an interrupted command has made is taken. Without `score` its responses
    are kept, and the next call that scores takes these.

    Raises:
        WorkerError, StopRequested: as `Processes.run`.
    """
    files = _Files(config.run_dir)
    only_for = (["--run-code"] if evaluate.run_code and score else []) + ([] if score else ["--no-score"])
    if is_evaluated(config.run_dir, evaluate, original, scored=False):
        processes.run(["score", str(files.unscored), *only_for], files.log)
        return
    for stale in (files.record, files.results, files.unscored):
        stale.unlink(missing_ok=True)
    options = {
        "--suite-data": evaluate.suite_data,
        "--problems": evaluate.problems,
        "--count": evaluate.count,
        "--max-new-tokens": evaluate.max_new_tokens,
        "--threshold": evaluate.threshold,
        "--slots": evaluate.slots,
        "--dtype": evaluate.dtype,
        "--original": config.model.path if original else "none",
        "--output": files.results,
    }
    arguments = ["eval", str(config.run_dir / "checkpoints" / FINAL), "--rule", "static", "--rule", "dynamic"]
    arguments += [part for suite in evaluate.suites for part in ("--suite", suite)]
    arguments += [part for name, value in options.items() if value is not None for part in (name, str(value))]
    processes.run([*arguments, *only_for], files.log)
    replace_text(files.record, json.dumps(_made_with(evaluate, original), indent=2) + "\n")


def read_suites(folder: Path) -> SuiteScores:
    """The means of all metrics by suite and then by `static`, `dynamic` and `original`, with `score`, the suite's own,
    and `problems`, their number; None: nothing was counted."""
    found: SuiteScores = {}
    for row in json.loads(_Files(folder).results.read_text())["rows"]:
        rule = "original" if row["model"] == "original" else row["unmasking"]["rule"]
        means = {name: metric["mean"] for name, metric in row["metrics"].items()}
        found.setdefault(row["suite"], {})[rule] = means | {"score": means[row["score"]], "problems": row["problems"]}
    return found


class _Files:
    """Of a run's folder: the results or the responses without scores, with what settings these were made, which is
    written when they are whole, and the output of the commands."""

    def __init__(self, folder: Path) -> None:
        self.results = folder / "suites.json"
        self.unscored = folder / "suites.unscored.json.gz"
        self.record = folder / "suites.made_with.json"
        self.log = folder / "suites.log"


def _made_with(evaluate: EvaluateConfig, original: bool) -> dict[str, Any]:
    return {**evaluate.model_dump(mode="json", exclude=_NOT_OF_RESULTS), "original": original}
