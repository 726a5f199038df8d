"""Prompts: files of questions, tokenised once, in the run's seeded order.

A prompt's ordinal is its position in that order over all epochs; everything later is keyed by (ordinal, sample).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config import DataConfig

_SUFFIXES = (".json", ".jsonl", ".parquet")


class PromptError(ValueError):
    """A prompt file is missing, empty or broken; the message names the place and the remedy."""


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt; `ids` int32 with the chat template and the generation prompt applied."""

    ordinal: int
    question: str
    ids: np.ndarray
    domain: str = ""
    answer: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the run's order, and how many were dropped for which reason."""

    prompts: list[Prompt]
    dropped: dict[str, int]


def load_prompts(data: DataConfig, tokenizer: Any, seed: int | None) -> PromptSet:
    """Read, tokenise, drop what is too long, and order by `seed` (None: the order of the file), epoch by epoch.

    Raises:
        PromptError: see read_records; or a question is missing, or no prompt is left.
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
            f"data.prompts {data.prompts!r}: all {len(questions)} prompts are longer than data.max_prompt_tokens "
            f"({data.max_prompt_tokens}); raise it"
        )
    prompts: list[Prompt] = []
    for epoch in range(data.epochs):
        rng = np.random.default_rng([seed, epoch]) if seed is not None else None
        order = rng.permutation(len(kept)) if rng is not None else np.arange(len(kept))
        for index in order[: data.limit]:
            question, ids, domain, answer = kept[index]
            prompts.append(Prompt(len(prompts), question, ids, domain, answer))
    return PromptSet(prompts, dict(dropped))


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
        PromptError: the path is missing, of an unknown kind, empty, or a row is not an object.
    """
    if not path.exists():
        raise PromptError(f"data.prompts: {str(path)!r} does not exist; give a JSON, JSONL or Parquet file or folder")
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in _SUFFIXES)
        if not files:
            raise PromptError(f"data.prompts: folder {str(path)!r} holds no {', '.join(_SUFFIXES)} file")
    else:
        files = [path]
    for file in files:
        count = 0
        for place, record in _read_file(file):
            if not isinstance(record, dict):
                raise PromptError(f"{place}: expected an object with fields, found {type(record).__name__}")
            count += 1
            yield place, record
        if not count:
            raise PromptError(f"data.prompts: {str(file)!r} is empty; remove it or fill it")


def _read_file(file: Path) -> Iterator[tuple[str, Any]]:
    if file.suffix == ".parquet":
        import pyarrow.parquet as parquet

        for row, record in enumerate(parquet.read_table(file).to_pylist()):
            yield f"{file}, row {row + 1}", record
    elif file.suffix == ".jsonl":
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            if line.strip():
                yield f"{file}, line {number}", _parse(line, f"{file}, line {number}")
    elif file.suffix == ".json":
        records = _parse(file.read_text() or "[]", str(file))
        if not isinstance(records, list):
            raise PromptError(f"{file}: expected a JSON list of objects; use .jsonl for one object a line")
        for row, record in enumerate(records):
            yield f"{file}, entry {row + 1}", record
    else:
        raise PromptError(f"data.prompts: {str(file)!r} is none of {', '.join(_SUFFIXES)}")


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = place if "line" in place else f"{place}, line {error.lineno}"
        raise PromptError(f"{where}: not valid JSON ({error.msg}); mend or remove it") from error
