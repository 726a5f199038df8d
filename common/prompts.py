"""Prompts: files of questions, tokenised once, in the run's seeded order.

A prompt's ordinal is its position in that order over all epochs; everything later is keyed by (ordinal, sample).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from common.config.run import DataConfig


class PromptError(ValueError):
    """A prompt file is missing, empty or broken; the message names the place and the remedy."""


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt; `ids` int32 with the chat template and the generation prompt applied.

    `responses`, int32 each, stand in for a rollout of every sample where they are set.
    """

    ordinal: int
    question: str
    ids: np.ndarray
    domain: str = ""
    answer: str | None = None
    responses: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the run's order; of the `read` rows of the files how many were dropped for which reason; and the
    offline responses by question."""

    prompts: list[Prompt]
    read: int
    dropped: dict[str, int]
    responses: dict[str, list[np.ndarray]] = field(default_factory=dict)


def load_prompts(data: DataConfig, tokenizer: Any, seed: int | None) -> PromptSet:
    """Read, tokenise, drop what is too long, and order by `seed` (None: the order of the file), epoch by epoch.

    Raises:
        PromptError: see read_records; a row has no question; or every prompt is too long.
    """
    questions = list(_questions(data))
    kept, dropped = [], Counter[str]()
    for question, domain, answer in questions:
        ids = prompt_ids(tokenizer, question, enable_thinking=data.enable_thinking)
        if len(ids) > data.max_prompt_tokens:
            dropped[f"longer than {data.max_prompt_tokens} tokens"] += 1
        else:
            kept.append((question, ids, domain, answer))
    if not kept:
        raise PromptError(
            f"{data.prompts!r}: all {len(questions)} prompts are longer than data.max_prompt_tokens "
            f"({data.max_prompt_tokens}); raise it"
        )
    prompts: list[Prompt] = []
    chosen = _order(len(kept), seed, 0)[: data.limit]
    for epoch in range(data.epochs):
        order = chosen if epoch == 0 else chosen[_order(len(chosen), seed, epoch)]
        for index in order:
            question, ids, domain, answer = kept[index]
            prompts.append(Prompt(len(prompts), question, ids, domain, answer))
    return PromptSet(prompts, len(questions), dict(dropped))


def _order(count: int, seed: int | None, epoch: int) -> np.ndarray:
    """int64 [count]: an epoch's order."""
    return np.arange(count) if seed is None else np.random.default_rng([seed, epoch]).permutation(count)


def prompt_ids(tokenizer: Any, question: str, *, enable_thinking: bool = False) -> np.ndarray:
    """int32 ids of one user turn with the chat template and the generation prompt."""
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        enable_thinking=enable_thinking,
    )
    return np.asarray(encoded["input_ids"], dtype=np.int32)


def _questions(data: DataConfig) -> Iterator[tuple[str, str, str | None]]:
    for place, record in read_records(Path(data.prompts)):
        question = record.get(data.question_field)
        if not isinstance(question, str) or not question.strip():
            raise PromptError(
                f"{place}: no text in field {data.question_field!r}; the record has {sorted(record)}. "
                "Set data.question_field to the field that holds the prompt"
            )
        answer = record.get(data.answer_field)
        yield question, str(record.get(data.domain_field) or ""), None if answer is None else str(answer)


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of every row of a JSON list, JSONL or Parquet file, or of a folder of them in sorted order.

    Raises:
        PromptError: the path is missing, of an unknown kind or empty, or a row is broken or not an object.
    """
    if not path.exists():
        raise PromptError(f"{str(path)!r} does not exist; give a JSON, JSONL or Parquet file, or a folder of them")
    files = sorted(f for f in path.rglob("*") if f.suffix in _READERS) if path.is_dir() else [path]
    if not files:
        raise PromptError(f"folder {str(path)!r} holds no {', '.join(_READERS)} file; put the prompts there")
    for file in files:
        if file.suffix not in _READERS:
            raise PromptError(f"{str(file)!r} is none of {', '.join(_READERS)}; convert or rename it")
        count = 0
        for place, record in _READERS[file.suffix](file):
            if not isinstance(record, dict):
                raise PromptError(f"{place}: expected an object with fields, found {type(record).__name__}")
            count += 1
            yield place, record
        if not count:
            raise PromptError(f"{str(file)!r} is empty; fill it or remove it")


def _read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = parquet.read_table(file).to_pylist()
    except pa.ArrowInvalid as error:
        raise PromptError(f"{file}: not valid Parquet ({error}); write it again") from error
    for row, record in enumerate(rows, start=1):
        yield f"{file}, row {row}", record


def _read_jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text(file).split("\n"), start=1):  # not splitlines: text may hold U+2028
        if line.strip():
            try:
                yield f"{file}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise PromptError(f"{file}, line {number}: not valid JSON ({error.msg}); mend or remove it") from error


def _read_json(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads(_text(file).strip() or "[]")
    except json.JSONDecodeError as error:
        hint = "one object a line belongs in a .jsonl file" if error.msg == "Extra data" else "mend it"
        raise PromptError(f"{file}, line {error.lineno}: not valid JSON ({error.msg}); {hint}") from error
    if not isinstance(records, list):
        raise PromptError(f"{file}: expected a JSON list of objects, found {type(records).__name__}")
    for row, record in enumerate(records, start=1):
        yield f"{file}, entry {row}", record


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
