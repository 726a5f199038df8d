"""The suites that `opdlm eval` knows by name: where each comes from, how it is asked, and how it is scored.

A model with a chat template gets one user turn (and for code the start of the assistant's turn, which ends in a code
fence, as in EvalPlus). One without, a base model, goes on with plain text; there the stop strings end what it would
write behind its answer. Limits are tokens of the response.

Where a checkpoint records a template for the suite's domain, because it was trained with it, that one takes the place
of the suite's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from common.config.evaluation import AnswerFormat
from common.conversations import QUESTION

ScorerKind = Literal["answer", "choice", "instructions", "code"]
Record = dict[str, Any]

BOXED = f"{QUESTION}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
LETTER = f'{QUESTION}\nPlease show your choice in the answer field with only the choice letter, e.g., "answer": "C".'
SCRIPT = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
    f"```\n{QUESTION}\n```"
)
SCRIPT_START = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:\n"
    "```python\n"
)
_NEXT_CODE = ("\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert ", "\nif __name__", "\nprint(")
_LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Suite:
    """One benchmark.

    `files` are the names, without suffix, under which it is looked for in a folder; `example_files` those of rows that
    may be shown as worked examples. `question`, `reference` and `solution` (the worked example's answer) read a row,
    and raise KeyError where it lacks a field. `answer_formats` are tried in turn: the first that finds an answer.
    """

    name: str
    scorer: ScorerKind
    question: Callable[[Record], str]
    reference: Callable[[Record], str | None]
    max_new_tokens: int
    files: tuple[str, ...] = ()
    hub: tuple[str, str | None, str | None] | None = None  # id, subset, split
    example_files: tuple[str, ...] = ()
    example_split: str | None = None
    solution: Callable[[Record], str] | None = None
    key_field: str | None = None
    domain: str = ""
    template: str = QUESTION
    start: str = ""  # of the assistant's turn
    stop: tuple[str, ...] = ()
    plain_template: str = QUESTION  # for models without a chat template
    plain_stop: tuple[str, ...] = ()
    answer_formats: tuple[AnswerFormat, ...] = ("boxed", "answer_line", "last_number")


def options_of(record: Record) -> list[str]:
    """The choices of an ARC or MMLU row, as the hub has them."""
    choices = record["choices"]
    return list(choices["text"] if isinstance(choices, dict) else choices)


def multiple_choice(record: Record) -> str:
    """The question with a letter before each choice."""
    lines = [f"{letter}. {text}" for letter, text in zip(_LETTERS, options_of(record), strict=False)]
    return "\n".join([record["question"], *lines])


def right_letter(record: Record) -> str:
    """The letter of the right choice: ARC's key may be a number, MMLU's answer is an index."""
    if "answerKey" in record:
        return _LETTERS[list(record["choices"]["label"]).index(record["answerKey"])]
    answer = record["answer"]
    return _LETTERS[answer] if isinstance(answer, int) else str(answer)


def _field(*names: str) -> Callable[[Record], str]:
    """The text of the first of these fields that a row has."""

    def read(record: Record) -> str:
        found = next((record[name] for name in names if record.get(name) is not None), None)
        if found is None:
            raise KeyError(names[0])
        return str(found)

    return read


def _gsm8k_solution(record: Record) -> str:
    """Without the calculator's marks, the answer in a box."""
    worked, _, answer = record["answer"].rpartition("####")
    return f"{re.sub(r'<<.*?>>', '', worked).strip()}\nThe answer is \\boxed{{{answer.strip()}}}."


def _mbpp_question(record: Record) -> str:
    text = _field("prompt", "text")(record)
    return '"""\n' + "\n".join([text, *record["test_list"]]) + '\n"""'


def _nothing(_: Record) -> None:
    return None


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "gsm8k",
            "answer",
            _field("question"),
            _field("answer"),
            1024,
            files=("gsm8k_test", "gsm8k"),
            hub=("openai/gsm8k", "main", "test"),
            example_files=("gsm8k_train",),
            example_split="train",
            solution=_gsm8k_solution,
            domain="math",
            template=BOXED,
            plain_template=f"Question: {QUESTION}\nAnswer:",
            plain_stop=("\nQuestion:",),
        ),
        Suite(
            "math500",
            "answer",
            _field("problem", "question"),
            _field("answer"),
            2048,
            files=("math500", "math500_test", "MATH-500"),
            hub=("HuggingFaceH4/MATH-500", None, "test"),
            example_files=("math_train", "math500_examples"),
            solution=_field("solution"),
            key_field="unique_id",
            domain="math",
            template=BOXED,
            plain_template=f"Problem: {QUESTION}\nSolution:",
            plain_stop=("\nProblem:",),
            answer_formats=("boxed",),
        ),
        Suite(
            "ifeval",
            "instructions",
            _field("prompt"),
            _nothing,
            1280,
            files=("ifeval", "ifeval_input_data"),
            hub=("google/IFEval", None, "train"),
            key_field="key",
            domain="chat",
        ),
        Suite(
            "humaneval",
            "code",
            _field("prompt"),
            _nothing,
            768,
            files=("humaneval", "HumanEval"),
            hub=("openai/openai_humaneval", None, "test"),
            key_field="task_id",
            domain="code",
            template=SCRIPT,
            start=SCRIPT_START,
            stop=("\n```",),
            plain_stop=_NEXT_CODE,
        ),
        Suite(
            "mbpp",
            "code",
            _mbpp_question,
            _nothing,
            768,
            files=("mbpp_test", "mbpp", "sanitized-mbpp"),
            hub=("google-research-datasets/mbpp", "sanitized", "test"),
            example_files=("mbpp_prompt", "mbpp_train"),
            example_split="prompt",
            solution=lambda record: f"{SCRIPT_START}{record['code'].strip()}\n```",
            key_field="task_id",
            domain="code",
            template=SCRIPT,
            start=SCRIPT_START,
            stop=("\n```",),
            plain_template=f"{QUESTION}\n",
            plain_stop=('\n"""', "\nassert ", "\nif __name__", "\nprint("),
        ),
        Suite(
            "arc",
            "choice",
            multiple_choice,
            right_letter,
            1024,
            files=("arc_challenge_test", "arc_challenge", "arc_test", "arc"),
            hub=("allenai/ai2_arc", "ARC-Challenge", "test"),
            example_files=("arc_challenge_train", "arc_train"),
            example_split="train",
            solution=lambda record: f'"answer": "{right_letter(record)}"',
            key_field="id",
            domain="science",
            template=LETTER,
            plain_template=f"Question: {QUESTION}\nAnswer:",
            plain_stop=("\n\n", "\nQuestion:"),
        ),
        Suite(
            "mmlu",
            "choice",
            multiple_choice,
            right_letter,
            1024,
            files=("mmlu_test", "mmlu"),
            hub=("cais/mmlu", "all", "test"),
            example_files=("mmlu_dev",),
            example_split="dev",
            solution=lambda record: f'"answer": "{right_letter(record)}"',
            domain="science",
            template=LETTER,
            plain_template=f"Question: {QUESTION}\nAnswer:",
            plain_stop=("\n\n", "\nQuestion:"),
        ),
    )
}


def plain_suite(name: str) -> Suite:
    """Any rows with a question and an answer, which are read and asked as the prompts of a run are."""
    return Suite(name, "answer", _field("question"), _field("answer"), 512, answer_formats=("answer_line",))
