r"""Final answers: how one is read from a response, and when it counts as right. The one scorer of this project.

| format | read from the response |
| --- | --- |
| `answer_line` | what stands behind the last ``Answer:``, also as ``**Answer:**`` or ``"answer":`` |
| `boxed` | the content of the last ``\boxed{...}``, the inner one of nested boxes |
| `last_number` | the last number of the text |

Right is what equals the reference: as numbers (see common/quantities.py), as text (case and punctuation around it do
not count), as the letter of a choice, or else mathematically (`math-verify`). A reference may be a worked solution:
with GSM8K's ``####``, a box, or an answer line it stands for what follows.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from common.config.evaluation import AnswerFormat
from common.math_equality import mathematically_equal
from common.quantities import last_quantity, leading_quantity, plain, quantity

_ANSWER_LINE = re.compile(r"answer[\"'*_`\s]*[:：][\"'*_`\s]*", re.IGNORECASE)  # noqa: RUF001 (the wide colon is meant)
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>]*\|>|</s>")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_MATH = re.compile(r"\\\((.*?)\\\)|\\\[(.*?)\\\]|\$\$(.+?)\$\$|\$(?!\s)([^$]+?)(?<!\s)\$(?!\d)", re.DOTALL)
_CHOICE = re.compile(r"\(?([A-Za-z])\)?(?:\s*[).:]\s.*|[).:]*)", re.DOTALL)
_PROSE = re.compile(
    r"(?<![A-Za-z\\])(?!(?:and|sin|cos|tan|log|exp|sqrt|det|mod|gcd|lcm|max|min)(?![A-Za-z]))[A-Za-z]{3}"
)
_NO_ANSWER = {"", "nan", "null", "none"}
_VALUE_FIELDS = ("value", "answer", "final_answer", "text", "ground_truth", "target", "label")


def final_answer(text: str, answer_format: AnswerFormat) -> str | None:
    """The answer that a response gives, as it is written there; None where it gives none."""
    return _READERS[answer_format](_SPECIAL_TOKEN.sub("\n", text))


def is_correct(text: str, reference: str, answer_format: AnswerFormat) -> bool:
    """Whether a response's final answer is the reference, or one of them where it is a JSON list of several."""
    given = final_answer(text, answer_format)
    return given is not None and any(same_answer(given, r) for r in _references(reference, answer_format))


def stated_answer(reference: str, answer_format: AnswerFormat) -> str:
    """The answer that a reference stands for, the first of several, without the worked solution around it."""
    return _references(reference, answer_format)[0].strip()


def same_answer(given: str, reference: str) -> bool:
    """Whether two answers are the same, see the module."""
    a, b = _bare(given), _bare(reference)
    if not a or not b:
        return False
    spaceless = [re.sub(r"\s", "", text) for text in (a, b)]
    named = "\\" not in a and re.search(r"[^\W\d_]{2}", a)  # words, not variables, whose case matters
    if spaceless[0] == spaceless[1] or (named and spaceless[0].casefold() == spaceless[1].casefold()):
        return True
    first, second = quantity(a), quantity(b)
    if first and second:
        return first.equals(second)
    if len(b.strip("().: ")) == 1 and b.strip("().: ").isalpha():
        choice = _CHOICE.fullmatch(a)
        return choice is not None and choice[1].casefold() == b.strip("().: ").casefold()
    words = _PROSE.search(a) or _PROSE.search(b) or (a.isalpha() and b.isalpha())
    return not words and mathematically_equal(b, a)


def reference_text(value: Any) -> str | None:
    """A row's answer as text; None where it is no answer: missing, empty, null or NaN.

    Several alternatives (a list) become a JSON list; of an object the field that holds the value is taken.
    """
    match value:
        case None:
            return None
        case float() | Decimal():
            return str(value) if math.isfinite(value) else None
        case list() | tuple():
            found = [text for text in map(reference_text, value) if text is not None]
            return json.dumps(found) if len(found) > 1 else (found[0] if found else None)
        case dict():
            return next((text for f in _VALUE_FIELDS if (text := reference_text(value.get(f))) is not None), None)
        case str():
            text = value.strip()
            if text.startswith(("[", "{")) and (parsed := _parsed(text)) is not None:
                return reference_text(parsed)
            return None if text.rpartition("####")[2].strip().casefold() in _NO_ANSWER else text
    return str(value)


def _parsed(text: str) -> Any:
    """A list or object written as text, by JSON or Python; `[1, 2]` is an interval, so elements must be quoted."""
    if not re.match(r"[\[{]\s*[\"']", text):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return None


def _references(reference: str, answer_format: AnswerFormat) -> list[str]:
    if reference.startswith('["'):
        return [one for text in json.loads(reference) for one in _references(text, answer_format)]
    if "####" in reference:
        return [reference.rpartition("####")[2]]
    box = _boxed(reference)
    if box is not None:
        return [box]
    worked = final_answer(reference, answer_format) if "\n" in reference else None
    return [reference if worked is None else worked]


def _bare(answer: str) -> str:
    """Without the markup and punctuation around it, in plain characters."""
    answer = answer.strip().strip("*_`\"'").strip()
    math = _MATH.fullmatch(answer.rstrip("."))
    if math:
        answer = next(part for part in math.groups() if part is not None)
    box = _boxed(answer)
    bare = plain(answer if box is None else box).strip(" \"'`*").rstrip(".,;").strip()
    return bare[1:-1].strip() if re.fullmatch(r"\{[^{}]*\}", bare) else bare


def _answer_line(text: str) -> str | None:
    """The last answer line that says something; of `x = 5` and `2 + 3 = 5` what stands behind the last `=`."""
    for found in reversed(list(_ANSWER_LINE.finditer(text))):
        line = text[found.end() :].partition("\n")[0].strip()
        line = line[: inner.start()] if (inner := _ANSWER_LINE.search(line)) else line
        if line:
            return _value_of_line(line)
    return None


def _value_of_line(line: str) -> str:
    box = _boxed(line)
    if box is not None:
        return box
    math = _MATH.match(line)
    if math:
        return next(part for part in math.groups() if part is not None)
    cleaned = plain(line)
    number = leading_quantity(cleaned)
    before, equals, last = cleaned.rpartition("=")
    if number is None and equals and not _PROSE.search(before):
        return leading_quantity(last.strip()) or last.strip()
    line = line.strip(" *_`\"'").rstrip(".").rstrip(" *_`\"'")
    unmatched = line.endswith("}") and line.count("}") > line.count("{")  # of {"answer": "C"}
    return number or (line[:-1].rstrip(" *_`\"'") if unmatched else line)


def _boxed(text: str) -> str | None:
    """Braces inside the box are matched; a box that is never closed is no answer."""
    for opened in reversed(list(_BOX.finditer(text))):
        depth, escaped = 1, False
        for end, character in enumerate(text[opened.end() :], opened.end()):
            if not escaped:
                depth += (character == "{") - (character == "}")
            escaped = character == "\\" and not escaped
            if depth == 0:
                return text[opened.end() : end]
    return None


def _last_number(text: str) -> str | None:
    return last_quantity(plain(text))


_READERS: dict[AnswerFormat, Callable[[str], str | None]] = {
    "answer_line": _answer_line,
    "boxed": _boxed,
    "last_number": _last_number,
}
