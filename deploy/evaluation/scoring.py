"""Scores of responses: every score is a ratio of sums over the problems, so that a response gives a numerator and a
denominator for each.

| scorer | scores, the suite's own first |
| --- | --- |
| answer | `exact_match`: the final answer is the reference (common/answers.py) |
| choice | `exact_match`: the letter is the right one |
| instructions | `instruction_strict`, `prompt_strict`, `instruction_loose`, `prompt_loose` (ifeval.py) |
| code | `passed`: the program passes its tests (code_execution.py) |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.answers import final_answer, is_correct
from deploy.evaluation import code_execution, ifeval
from deploy.evaluation.problems import Problem
from deploy.evaluation.suites import ScorerKind, Suite

# the suite's own score first; then the one that says whether a problem is solved, for pass@k
SCORES: dict[ScorerKind, tuple[str, ...]] = {
    "answer": ("exact_match",),
    "choice": ("exact_match",),
    "instructions": ("instruction_strict", "prompt_strict", "instruction_loose", "prompt_loose"),
    "code": ("passed",),
}
SOLVED: dict[ScorerKind, str] = {
    "answer": "exact_match",
    "choice": "exact_match",
    "instructions": "prompt_strict",
    "code": "passed",
}
_CHOICE = re.compile(r"\W*([A-J])\b(?!['’])")  # noqa: RUF001 (both apostrophes)
_SAID_CHOICE = re.compile(r"(?:answer|choice|option)\b\W*(?:is|:|would be)?\W*([A-J])\b", re.IGNORECASE)


@dataclass(frozen=True)
class Score:
    """`ratios`: numerator and denominator by score. `facts`: what else is worth keeping of a response."""

    ratios: dict[str, tuple[float, float]]
    facts: dict[str, Any] = field(default_factory=dict)


def score_all(
    suite: Suite, problems: Sequence[Problem], texts: Sequence[str], done: Callable[[], None] = lambda: None
) -> list[Score]:
    """The score of each text, which answers the problem at the same place; `done` is called after each."""
    if suite.scorer == "code":
        return _code_scores(problems, texts, done)
    scores = []
    for problem, text in zip(problems, texts, strict=True):
        scores.append(_SCORERS[suite.scorer](suite, problem, text))
        done()
    return scores


def _answer_score(suite: Suite, problem: Problem, text: str) -> Score:
    formats = [f for f in suite.answer_formats if final_answer(text, f) is not None]
    if not formats:
        return Score({"exact_match": (0, 1)}, {"answer": None})
    right = is_correct(text, problem.reference or "", formats[0])
    return Score({"exact_match": (right, 1)}, {"answer": final_answer(text, formats[0])})


def _choice_score(suite: Suite, problem: Problem, text: str) -> Score:
    letter = chosen_letter(text)
    return Score({"exact_match": (letter == problem.reference, 1)}, {"answer": letter})


def chosen_letter(text: str) -> str | None:
    """The letter that a response chooses: in an answer line or a box, behind `the answer is`, or at its beginning."""
    for answer_format in ("answer_line", "boxed"):
        if (answer := final_answer(text, answer_format)) and (found := _CHOICE.match(answer)):
            return found[1]
    said = _SAID_CHOICE.findall(text)
    first = _CHOICE.match(text)
    return said[-1].upper() if said else (first[1] if first else None)


def _instructions_score(suite: Suite, problem: Problem, text: str) -> Score:
    ratios: dict[str, tuple[float, float]] = {}
    strict, loose = ifeval.followed(problem.record, text)
    for name, each in (("strict", strict), ("loose", loose)):
        checked = [one for one in each if one is not None]
        ratios[f"instruction_{name}"] = (sum(checked), len(checked))
        whole = len(checked) == len(each)
        ratios[f"prompt_{name}"] = (all(checked) and whole, whole)
    ordered = {name: ratios[name] for name in SCORES["instructions"]}
    return Score(ordered, {"followed": strict, "followed_loosely": loose, "unchecked": strict.count(None)})


def _code_scores(problems: Sequence[Problem], texts: Sequence[str], done: Callable[[], None]) -> list[Score]:
    programs = [
        code_execution.program_of(p.record, code_execution.code_of(text, p.begun))
        for p, text in zip(problems, texts, strict=True)
    ]
    outcomes = code_execution.run_programs(programs, done)
    return [Score({"passed": (o.passed, 1)}, {"error": o.reason or None}) for o in outcomes]


_SCORERS: dict[ScorerKind, Callable[[Suite, Problem, str], Score]] = {
    "answer": _answer_score,
    "choice": _choice_score,
    "instructions": _instructions_score,
}
