r"""Final answers: how one is read from a response, and when it counts as right.

| format | read from the response |
| --- | --- |
| `answer_line` | the number after the last ``Answer:`` |
| `boxed` | the content of the last ``\boxed{...}`` |
| `last_number` | the last number of the text |

Both sides are normalised before they are compared: surrounding `$` and spaces, thousands commas and the zeros behind
a decimal point do not count. A reference with GSM8K's ``####`` stands for what follows it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from common.config.run import AnswerFormat

_ANSWER_LINE = re.compile(r"Answer: (-?\d+)")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_PLAIN_NUMBER = re.compile(r"-?[\d,]*\d(?:\.\d+)?")
_BOXED = "\\boxed{"


def final_answer(text: str, answer_format: AnswerFormat) -> str | None:
    """The answer that a response gives, as it is written there; None where it gives none."""
    return _READERS[answer_format](text)


def is_correct(text: str, reference: str, answer_format: AnswerFormat) -> bool:
    """Whether a response's final answer is the reference: exact match after normalisation."""
    given = final_answer(text, answer_format)
    return given is not None and normalised(given) == normalised(reference.rpartition("####")[2])


def normalised(answer: str) -> str:
    r"""`$1,200.00` and `1200` are the same answer; so are ` \frac{1}{2}` and `\frac{1}{2}.`"""
    answer = answer.strip().strip("$").strip().rstrip(".")
    if _PLAIN_NUMBER.fullmatch(answer):
        answer = answer.replace(",", "")
        answer = answer.rstrip("0").rstrip(".") if "." in answer else answer
    return answer


def _answer_line(text: str) -> str | None:
    found = _ANSWER_LINE.findall(text)
    return found[-1] if found else None


def _boxed(text: str) -> str | None:
    """Braces inside the box are matched; a box that is never closed is no answer."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth = 1
    for end, character in enumerate(text[start + len(_BOXED) :], start + len(_BOXED)):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start + len(_BOXED) : end]
    return None


def _last_number(text: str) -> str | None:
    found = _NUMBER.findall(text)
    return found[-1].rstrip(",") if found else None


_READERS: dict[AnswerFormat, Callable[[str], str | None]] = {
    "answer_line": _answer_line,
    "boxed": _boxed,
    "last_number": _last_number,
}
