"""Responses of `opdlm eval --no-score`: one file with all that scoring needs, so that another machine can score them.

A machine with GPUs often lacks what checks the responses: packages, NLTK's data, leave to run code. The file is gzipped
JSON: `report` (the results' JSON without rows), `suites` (the problems) and `runs` (settings with their responses). It
needs neither the model nor the suites' files.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from actors.evaluation.responses import Response
from actors.evaluation.worker import ModelSpec
from common.config.errors import ConfigError
from common.config.unmasking import Unmasking
from deploy.evaluation.problems import Problem, SuiteProblems
from deploy.evaluation.response_file import as_json
from deploy.evaluation.suites import SUITES, Suite, plain_suite
from deploy.evaluation.sweep import Run, Setting

SUFFIX = ".unscored.json.gz"
FORMAT_VERSION = 1
_UNMASKING: TypeAdapter[Unmasking | None] = TypeAdapter(Unmasking | None)


@dataclass(frozen=True)
class Unscored:
    """The runs of one setting on one suite, one a seed."""

    suite: SuiteProblems
    spec: ModelSpec
    setting: Setting
    runs: list[Run]


def save(path: Path, report: dict[str, Any], every: Sequence[Unscored]) -> None:
    suites = {each.suite.suite.name: each.suite for each in every}
    content = {
        "format_version": FORMAT_VERSION,
        "report": report,
        "suites": [_suite_record(suite) for suite in suites.values()],
        "runs": [_run_record(each) for each in every],
    }
    partial = path.with_name(f".{path.name}.partial")
    with gzip.open(partial, "wt", encoding="utf-8") as file:
        file.write(as_json(content))
    partial.replace(path)


def load(path: Path) -> tuple[dict[str, Any], list[Unscored]]:
    """The report without rows, and the runs in their order.

    Raises:
        ConfigError: the file is none of these, or of another format version.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            content = json.load(file)
    except (gzip.BadGzipFile, EOFError, ValueError) as error:
        raise ConfigError(
            f"FILE: {str(path)!r} is no file of responses ({error}); give a {SUFFIX} file of opdlm eval --no-score"
        ) from error
    if content.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"FILE: {str(path)!r} has format version {content.get('format_version')!r}, not {FORMAT_VERSION}; score it "
            "with the release that wrote it"
        )
    suites = {record["name"]: _suite_of(record) for record in content["suites"]}
    return content["report"], [_run_of(record, suites) for record in content["runs"]]


def _suite_record(suite: SuiteProblems) -> dict[str, Any]:
    return {
        "name": suite.suite.name,
        "answer_formats": suite.suite.answer_formats,
        "source": suite.source,
        "stop": suite.stop,
        "template": suite.template,
        "shots": suite.shots,
        "left_out": suite.left_out,
        "problems": [
            {"key": p.key, "question": p.question, "record": p.record, "reference": p.reference, "begun": p.begun}
            for p in suite.problems
        ],
    }


def _suite_of(record: dict[str, Any]) -> SuiteProblems:
    """Without the prompts' tokens, which nothing reads any more."""
    suite: Suite = SUITES.get(record["name"]) or plain_suite(record["name"])
    none = np.zeros(0, np.int32)
    return SuiteProblems(
        replace(suite, answer_formats=tuple(record["answer_formats"])),
        record["source"],
        [Problem(ordinal, ids=none, **fields) for ordinal, fields in enumerate(record["problems"])],
        tuple(record["stop"]),
        record["template"],
        record["shots"],
        record["left_out"],
        (),
    )


def _run_record(each: Unscored) -> dict[str, Any]:
    return {
        "suite": each.suite.suite.name,
        "model": asdict(each.spec),
        "unmasking": each.setting.unmasking.model_dump() if each.setting.unmasking else None,
        "block_size": each.setting.block_size,
        "seeds": [
            {"seconds": run.seconds, "responses": [{**vars(r), "ids": r.ids.tolist()} for r in run.responses]}
            for run in each.runs
        ],
    }


def _run_of(record: dict[str, Any], suites: dict[str, SuiteProblems]) -> Unscored:
    runs = [
        Run([Response(**{**r, "ids": np.asarray(r["ids"], np.int32)}) for r in seed["responses"]], seed["seconds"])
        for seed in record["seeds"]
    ]
    setting = Setting(_UNMASKING.validate_python(record["unmasking"]), record["block_size"])
    return Unscored(suites[record["suite"]], ModelSpec(**record["model"]), setting, runs)
