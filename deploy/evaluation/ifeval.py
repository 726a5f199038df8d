"""IFEval: which of a prompt's instructions a response follows, by the checkers in lm_eval's package.

`strict` looks at the response as it is. `loose` also takes it without its first line, its last line, both, and each of
these without asterisks; an instruction is followed if one of the eight follows it (Zhou et al., 2023, arXiv
2311.07911).

Some checkers need data that NLTK downloads (`punkt_tab`). Where it is neither there nor can be brought, their
instructions are not checked: they are counted apart and belong to neither the followed nor the failed ones, and
prompts that hold one are left out of the prompt-level scores. All other scores are as published.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib.util import find_spec
from typing import Any

from common.config.errors import ConfigError
from deploy.evaluation.suites import Record

_PACKAGES = ("lm_eval", "langdetect", "immutabledict", "nltk")
_lacks_data: dict[str, bool] = {}  # by instruction


def missing_packages() -> list[str]:
    """Those of the checkers that are not installed."""
    return [name for name in _PACKAGES if find_spec(name) is None]


def check_installed() -> None:
    """Raises ConfigError where the checkers' packages are missing."""
    if missing := missing_packages():
        raise ConfigError(
            f"--suite ifeval: {', '.join(missing)} not installed; install opdlm[eval], or keep the "
            "responses with --no-score and score them elsewhere"
        )


def followed(record: Record, response: str) -> tuple[list[bool | None], list[bool | None]]:
    """(strict, loose) for each instruction; None: it could not be checked here.

    Raises:
        KeyError: the row has no instructions, or one that the checkers do not know.
    """
    strict = _each(record, lambda check: bool(response.strip()) and check(response))
    variants = [text for text in _variants(response) if text.strip()]
    return strict, _each(record, lambda check: any(check(text) for text in variants))


def _each(record: Record, follows: Callable[[Callable[[str], bool]], bool]) -> list[bool | None]:
    """Whether the response follows each instruction, in the order in which lm_eval makes the checkers."""
    found: list[bool | None] = []
    for name, arguments in zip(record["instruction_id_list"], record["kwargs"], strict=True):
        checker = _checkers()[name](name)
        checker.build_description(**{key: value for key, value in (arguments or {}).items() if value})
        if "prompt" in (checker.get_instruction_args() or {}):
            checker.build_description(prompt=record["prompt"])
        if name not in _lacks_data:
            _lacks_data[name] = _raises_lookup_error(checker)
        found.append(None if _lacks_data[name] else bool(follows(checker.check_following)))
    return found


def _raises_lookup_error(checker: Any) -> bool:
    """Whether a checker misses data of NLTK, which says so with a LookupError."""
    try:
        checker.check_following("One sentence. Another one.")
    except LookupError as error:
        return type(error) is LookupError  # a KeyError is another thing
    return False


def _variants(response: str) -> list[str]:
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(text.replace("*", "") for text in cut)]


@cache
def _checkers() -> dict[str, Any]:
    """lm_eval's checkers by name. Importing them tries to bring NLTK's data, with words that say nothing here."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        from langdetect import DetectorFactory
        from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    DetectorFactory.seed = 0  # the language that it detects is random otherwise
    return dict(INSTRUCTION_DICT)
