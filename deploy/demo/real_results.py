"""What came of `make real`, as one JSON document: from the run's metrics, the evaluation, and the long responses.

| field | meaning |
| --- | --- |
| `ar`, `static`, `dynamic` | the original, and the student under two decodings: `ifeval` and `gsm8k` in percent, ... |
| `rows` | every row of the evaluation: scores in percent, with 95% intervals and paired differences to the original |
| `response_tokens`, `gpu_minutes`, `kl`, `held_out_kl` | of the training; `kl` is the mean of the last 10 batches |
| `curve` | before the training and after each batch; `ifeval_at`: IFEval of checkpoints, where it was measured |
| `long` | long responses: how many end, their lengths and repetitions; `examples`: some side by side |

`dynamic` is the highest threshold that reaches `ENOUGH_TOKENS_PER_STEP`, or the highest of all where none does.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy.evaluation import unscored
from deploy.evaluation.unscored import Unscored

FORMAT_VERSION = 1
ENOUGH_TOKENS_PER_STEP = 1.8
_MAIN = "ifeval"  # the suite that `dynamic` is chosen by
_LAST_BATCHES = 10
_CURVE = ("response_tokens", "kl", "eval/held_out_kl", "tokens_per_step", "response_length", "share_eos")
_SHARES = {"share_ended": "ended"}
_COUNTS = ("tokens_per_step", "forwards_per_token_with_commits", "tokens_per_second", "response_tokens_mean")
_EXAMPLES = 3
_LONGEST_PERIOD, _LOOP_TOKENS, _LOOP_TIMES = 64, 32, 3


def results_of(folder: Path, run_dir: Path) -> dict[str, Any]:
    """The document of what is in the folder; parts that are not there are left out.

    Raises:
        FileNotFoundError: there is no training.
    """
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    finished = run_dir / "summary.json"
    summary = json.loads(finished.read_text()) if finished.exists() else {}
    found: dict[str, Any] = {"format_version": FORMAT_VERSION, **training_of(metrics, summary)}
    if (file := folder / "eval.json").exists():
        report = json.loads(file.read_text())
        rows = [row_of(row) for row in report["rows"]]
        found |= {"device": report["device"], "versions": report["versions"], "rows": rows, **main_rows(rows)}
    before = {"response_tokens": 0, "eval/held_out_kl": found["held_out_kl_before"]}
    found["curve"] = [{name.rpartition("/")[2]: row.get(name) for name in _CURVE} for row in [before, *metrics]]
    found["ifeval_at"] = ifeval_at(folder / "at", metrics)
    if (file := folder / f"long{unscored.SUFFIX}").exists():
        report, every = unscored.load(file)
        found["long"] = {"max_new_tokens": report["suites"][0]["max_new_tokens"], **long_responses(every)}
    return found


def training_of(metrics: Sequence[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    """`summary` is empty while the run is not finished; what it alone knows is None then."""
    last = metrics[-1]
    held_out = [row["eval/held_out_kl"] for row in metrics if row.get("eval/held_out_kl") is not None]
    before, after = (summary.get(name) or {} for name in ("held_out_kl_init", "held_out_kl"))
    return {
        "response_tokens": last["response_tokens"],
        "gpu_minutes": 60 * last["gpu_hours"],
        "kl": statistics.fmean(row["kl"] for row in metrics[-_LAST_BATCHES:]),
        "held_out_kl": held_out[-1] if held_out else None,
        "held_out_kl_before": before.get("mean"),
        "held_out_kl_by_offset": after.get("by_offset"),
        "batches": len(metrics),
        "updates": last["updates"],
        "seconds": sum(row["seconds/batch"] for row in metrics),
        **{name: last[name] for name in ("flops/rollout", "flops/teacher", "flops/learner")},
    }


def row_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `eval.json`: scores and shares in percent."""
    metrics = row["metrics"]
    main = metrics[row["score"]]
    difference = main["difference"]
    return {
        "suite": row["suite"],
        "model": row["model"],
        "decoding": row["decoding"],
        "problems": row["problems"],
        "score": percent(main["mean"]),
        "interval": [percent(value) for value in main["interval"]] if main["interval"] else None,
        "difference": [percent(difference[0]), [percent(value) for value in difference[1]]] if difference else None,
        **{name: percent(metrics[name]["mean"]) for name in ("prompt_strict",) if name in metrics},
        **{short: percent(metrics[name]["mean"]) for name, short in _SHARES.items()},
        **{name: metrics[name]["mean"] for name in _COUNTS},
        **row["facts"],
    }


def percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def main_rows(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`ar`, `static` and `dynamic`: the score of each suite by its name, and the speed on IFEval."""
    main = [row for row in rows if row["suite"] == _MAIN] or list(rows)
    dynamic = sorted((row for row in main if row["decoding"].startswith("dynamic")), key=_threshold, reverse=True)
    fast = [row for row in dynamic if (row["tokens_per_step"] or 0) >= ENOUGH_TOKENS_PER_STEP]
    chosen = {"ar": "AR", "static": "static 1"}
    if dynamic:
        chosen["dynamic"] = [*fast, dynamic[0]][0]["decoding"]
    found = {}
    for name, decoding in chosen.items():
        of_decoding = [row for row in rows if row["decoding"] == decoding]
        if of_decoding:
            speed = next(row for row in main if row["decoding"] == decoding)
            scores = {row["suite"]: row["score"] for row in of_decoding}
            found[name] = {"decoding": decoding, **scores, "minus_ar": speed["difference"], "ended": speed["ended"]}
            found[name] |= {count: speed[count] for count in _COUNTS}
    return found


def _threshold(row: dict[str, Any]) -> float:
    return float(row["decoding"].split()[1])


def ifeval_at(folder: Path, metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """IFEval of each checkpoint `batch-N` that has been evaluated, by the response tokens that it had seen."""
    tokens = {row["batch"] + 1: row["response_tokens"] for row in metrics}
    found = []
    for file in sorted(folder.glob("batch-*.json")):
        rows = json.loads(file.read_text())["rows"]
        scores = {row["decoding"]: percent(row["metrics"][row["score"]]["mean"]) for row in rows}
        found.append({"response_tokens": tokens[int(file.stem.removeprefix("batch-"))], **scores})
    return found


def long_responses(every: Sequence[Unscored]) -> dict[str, Any]:
    """`rows` for each model and decoding; `examples`: evenly spaced prompts with the response of each."""
    rows = []
    for each in every:
        responses = each.runs[0].responses
        lengths = [len(response.ids) for response in responses]
        rows.append(
            {
                "model": each.spec.kind,
                "decoding": each.setting.decoding,
                "responses": len(responses),
                "ended": 100 * statistics.fmean(response.ended for response in responses),
                "tokens_mean": statistics.fmean(lengths),
                "tokens_median": statistics.median(lengths),
                "repeated_4grams": 100 * statistics.fmean(repeated_share(response.ids) for response in responses),
                "in_a_loop": 100 * statistics.fmean(ends_in_a_loop(response.ids) for response in responses),
            }
        )
    problems = every[0].suite.problems
    places = [int(place) for place in np.linspace(0, len(problems), _EXAMPLES, endpoint=False)]
    by_ordinal = [{response.ordinal: response for response in each.runs[0].responses} for each in every]
    examples = [
        {
            "question": problems[place].question,
            "responses": {
                f"{each.spec.kind}, {each.setting.decoding}": responses[place].text
                for each, responses in zip(every, by_ordinal, strict=True)
            },
        }
        for place in dict.fromkeys(places)
    ]
    return {"rows": rows, "examples": examples}


def repeated_share(ids: np.ndarray, size: int = 4) -> float:
    """1 - distinct runs of `size` tokens / all of them (seq-rep-4 of Welleck et al., 2020, arXiv 1908.04319); 0 for
    shorter responses."""
    runs = [tuple(ids[first : first + size].tolist()) for first in range(len(ids) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def ends_in_a_loop(ids: np.ndarray) -> bool:
    """Whether the last 32 tokens or more repeat a run of at most 64 tokens, three times at least."""
    for period in range(1, _LONGEST_PERIOD + 1):
        tokens = max(_LOOP_TIMES * period, _LOOP_TOKENS)
        if len(ids) >= tokens and bool((ids[-tokens + period :] == ids[-tokens:-period]).all()):
            return True
    return False
