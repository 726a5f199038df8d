"""Problems by how often a model solves them: those it always or never solves tell nothing of a change.

The rate is the share of a problem's responses, as `opdlm respond --samples N` writes them, whose final answer is right
(common/answers.py). Chosen by these samples, a problem near a bound may be on its other side: more samples, fewer such.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import parquet
from pyarrow.lib import ArrowInvalid

from common.answers import is_correct
from common.config.errors import ConfigError
from common.config.evaluation import AnswerFormat

_FIELDS = ("question", "answer", "response")


@dataclass(frozen=True)
class RatedProblem:
    """A question with its answer, and how many of its responses are right."""

    question: str
    answer: str
    domain: str
    right: int
    samples: int

    @property
    def rate(self) -> float:
        return self.right / self.samples


def read_responses(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of responses: `question`, `answer`, `response` and, where there is one, `domain`.

    Raises:
        ConfigError: it is no such file.
    """
    try:
        rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
    except ArrowInvalid as error:
        raise ConfigError(f"RESPONSES: {str(file)!r} is no Parquet file; give one of opdlm respond") from error
    if missing := [name for name in _FIELDS if not rows or name not in rows[0]]:
        raise ConfigError(
            f"RESPONSES: {str(file)!r} has no {missing[0]!r} in its rows; give a file of opdlm respond, made with the "
            "usual names of fields"
        )
    return rows


def solve_rates(rows: Sequence[Mapping[str, Any]], answer_format: AnswerFormat) -> list[RatedProblem]:
    """The problems with an answer, in the order of their first responses."""
    samples: Counter[tuple[str, str, str]] = Counter()
    right: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        if row["answer"] is not None:
            key = row["question"], row["answer"], row.get("domain") or ""
            samples[key] += 1
            right[key] += is_correct(row["response"], row["answer"], answer_format)
    return [RatedProblem(*key, right[key], count) for key, count in samples.items()]
