"""The problems of a suite: its rows, read from wherever they are, as prompts of one model family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common import prompts
from common.chat import ChatTemplate
from common.config.data import DataConfig
from common.config.errors import ConfigError
from common.conversations import QUESTION, Conversation, Turn
from common.datasets.errors import PromptError
from common.datasets.formats import format_of, stem_of
from common.datasets.rows import Rows, open_rows
from common.prompts import Row, tokenised
from deploy.evaluation.suites import Record, Suite

MOST_PROBLEMS = 10**9
_NO_ANSWER = "no answer (missing, empty, null or NaN)"


@dataclass(frozen=True)
class Problem:
    """`key` is the suite's own name of the row, else its number from 1. `ids` int32 is the whole prompt; `begun`: it
    holds the start of the assistant's turn."""

    ordinal: int
    key: str
    question: str
    ids: np.ndarray
    record: Record
    reference: str | None = None
    begun: bool = False


@dataclass(frozen=True)
class SuiteProblems:
    """A suite as it is asked here: stop strings and template are those of this model.

    `left_out` counts rows by reason; `notes` are sentences on how the source was read.
    """

    suite: Suite
    source: str
    problems: list[Problem]
    stop: tuple[str, ...]
    template: str
    shots: int
    left_out: dict[str, int]
    notes: tuple[str, ...]

    def less_room(self, limit: int, positions: int) -> int:
        """Problems whose prompt leaves less than `limit` of the `positions` for a response."""
        return sum(positions - len(problem.ids) < limit for problem in self.problems)


@dataclass(frozen=True)
class Source:
    """Where the rows of a suite are: a file, a folder or a hub id, and which of its splits and subsets."""

    place: str
    split: str | None = None
    subset: str | None = None

    def rows(self) -> Rows:
        return open_rows(self.place, self.split, self.subset)

    @property
    def is_file(self) -> bool:
        return Path(self.place).exists()


def source_of(suite: Suite, given: str | None, folder: Path | None) -> Source:
    """Where a suite's rows are: what was given for it, else its file in the folder of suites, else its hub id.

    Raises:
        ConfigError: the folder does not hold it.
    """
    if given:
        return Source(given)
    if folder:
        if not folder.is_dir():
            raise ConfigError(f"--suite-data: {str(folder)!r} is no folder; give one that holds {_names(suite.files)}")
        if found := _named(folder, suite.files):
            return Source(str(found))
        raise ConfigError(
            f"--suite-data: {str(folder)!r} holds no file {_names(suite.files)} (.jsonl, .json, .csv, .parquet); put "
            f"it there, or give it as --suite {suite.name}=FILE"
        )
    assert suite.hub
    place, subset, split = suite.hub
    return Source(place, split, subset)


def load_problems(
    suite: Suite,
    source: Source,
    tokenizer: Any,
    *,
    asked: dict[str, Any],
    template: str | None,
    shots: int,
    count: int | None,
    positions: int,
) -> SuiteProblems:
    """The first `count` problems, each as a prompt that leaves room for a response.

    Args:
        asked: how the student was asked in training: fields `system`, `enable_thinking` and `templates`.
        template: of the user's turn, in place of the suite's and the recorded one.
        shots: worked examples before each problem.
        positions: tokens that the models can read.

    Raises:
        ConfigError: the rows cannot be read, none can be used, or there are no worked examples.
    """
    chat = ChatTemplate(tokenizer, enable_thinking=bool(asked.get("enable_thinking")))
    recorded = (asked.get("templates") or {}).get(suite.domain)
    text = template or (suite.plain_template if chat.raw else recorded or suite.template)
    left_out = Counter[str]()
    examples = _examples(suite, source, shots) if shots else []
    rows: list[tuple[Row, Record, str]] = []
    option = f"--suite {suite.name}"
    try:
        source_rows = source.rows()
        for number, (place, record) in enumerate(source_rows, start=1):
            if count is not None and len(rows) == count:
                break
            try:
                question, reference = suite.question(record), suite.reference(record)
            except (KeyError, IndexError, TypeError, ValueError) as error:
                wrong = f"no field {error}" if isinstance(error, KeyError) else str(error)
                raise PromptError(
                    f"{place}: this is no row of {suite.name} ({wrong}; its fields are {', '.join(sorted(record))}); "
                    "fix the file, or give another"
                ) from error
            if reference is None and suite.scorer in ("answer", "choice"):
                left_out[_NO_ANSWER] += 1
                continue
            key = str(record.get(suite.key_field or "", number))
            conversation = _conversation(suite, chat.raw, text, examples, question, asked.get("system"))
            rows.append((Row(place, question, conversation, suite.domain, reference), record, key))
        found = tokenised([row for row, _, _ in rows], chat, left_out)
    except PromptError as error:
        hint = "" if source.is_file else f"; or give its file as --suite {suite.name}=FILE, or --suite-data FOLDER"
        raise ConfigError(f"{option}: {error}{hint}") from error
    every = [
        Problem(0, key, row.question, ids, record, row.answer, row.conversation.starts_response)
        for (row, record, key), ids in zip(rows, found, strict=True)
        if ids is not None
    ]
    problems = _with_room(option, source.place, every, positions, left_out)
    stop = suite.plain_stop if chat.raw else suite.stop
    return SuiteProblems(suite, source.place, problems, stop, text, shots, dict(left_out), source_rows.notes)


def plain_problems(
    suite: Suite, option: str, data: DataConfig, tokenizer: Any, count: int | None, positions: int
) -> SuiteProblems:
    """Rows of any form that prompts of a run may have, with an answer, asked as in a run.

    Raises:
        ConfigError: the rows cannot be read, or none can be used.
    """
    try:
        found = prompts.load_problems(data, tokenizer, count or MOST_PROBLEMS)
    except PromptError as error:
        raise ConfigError(f"{option}: {error}") from error
    every = [Problem(0, str(i), p.question, p.ids, {}, p.answer) for i, p in enumerate(found.prompts, start=1)]
    left_out = Counter(found.dropped)
    problems = _with_room(option, data.prompts, every, positions, left_out)
    return SuiteProblems(suite, data.prompts, problems, (), "", 0, dict(left_out), found.notes)


def _with_room(
    option: str, place: str, problems: list[Problem], positions: int, left_out: Counter[str]
) -> list[Problem]:
    """Those whose prompt leaves room for a response, numbered; the others are counted in `left_out`."""
    kept = [problem for problem in problems if len(problem.ids) < positions]
    if len(kept) < len(problems):
        left_out[f"prompt that fills the {positions} positions of the model"] += len(problems) - len(kept)
    if not kept:
        reasons = "; ".join(f"{number} {reason}" for reason, number in left_out.items()) or "there are no rows"
        raise ConfigError(f"{option}: none of the problems of {place!r} can be used ({reasons}); give others")
    return [replace(problem, ordinal=ordinal) for ordinal, problem in enumerate(kept)]


def _conversation(
    suite: Suite, plain: bool, template: str, examples: list[tuple[str, str]], question: str, system: str | None
) -> Conversation:
    """Examples as earlier turns; without a chat template all in one text."""
    if plain:
        before = "".join(f"{template.replace(QUESTION, q)} {answer}\n\n" for q, answer in examples)
        return Conversation((Turn("user", before + template.replace(QUESTION, question)),), suite.name)
    turns = [Turn("system", system)] if system else []
    for earlier, answer in examples:
        turns += [Turn("user", template.replace(QUESTION, earlier)), Turn("assistant", answer)]
    turns.append(Turn("user", template.replace(QUESTION, question)))
    if suite.start:
        turns.append(Turn("assistant", suite.start))
    return Conversation(tuple(turns), suite.name)


def _examples(suite: Suite, source: Source, shots: int) -> list[tuple[str, str]]:
    """(question, worked answer) of the first rows of the suite's examples: a file beside its own, or a split."""
    if not suite.solution:
        raise ConfigError(f"--shots: {suite.name} has no worked examples; use 0")
    if source.is_file:
        beside = Path(source.place).parent
        file = _named(beside, suite.example_files)
        if not file:
            raise ConfigError(
                f"--shots: {str(beside)!r} holds no worked examples for {suite.name}; put its file "
                f"{_names(suite.example_files)} there, or use 0"
            )
        source = Source(str(file))
    else:
        source = replace(source, split=suite.example_split)
    examples = []
    try:
        for _, record in source.rows():
            examples.append((suite.question(record), suite.solution(record)))
            if len(examples) == shots:
                return examples
    except PromptError as error:
        raise ConfigError(f"--shots: {error}") from error
    raise ConfigError(f"--shots: {source.place!r} has {len(examples)} worked examples, not {shots}; use fewer")


def _named(folder: Path, stems: Sequence[str]) -> Path | None:
    """The file of a folder that has one of these names, the first name first."""
    files = {stem_of(file): file for file in sorted(folder.iterdir()) if file.is_file() and format_of(file)}
    return next((files[stem] for stem in stems if stem in files), None)


def _names(stems: Sequence[str]) -> str:
    return " or ".join(stems)
