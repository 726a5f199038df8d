"""Prompts: rows of any source, asked through the chat template, tokenised once, in the run's seeded order.

A prompt's ordinal is its position in that order over all epochs; everything later is keyed by (ordinal, sample).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from common.answers import reference_text
from common.chat import TEMPLATE_ERRORS, ChatTemplate, has_thinking_switch, missing_turn
from common.config.data import DataConfig
from common.conversations import Conversation, LeftOut, Turn, conversation_of, template_for, whole_characters
from common.datasets.errors import PromptError
from common.datasets.rows import open_rows
from common.grid import grid_ceil
from common.trajectory import Trajectory

_CHUNK = 1024  # prompts tokenised together


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt; `ids` int32 with the chat template and the generation prompt applied.

    `responses`, int32 each, or rollouts of an earlier run, stand in for the rollout of every sample where they are set.
    Samples are numbered from `first_sample` on: further ones of a prompt are another loss's (`part_of`). The last
    `begun` of the ids are the beginning of a response, which the rollouts go on with.
    """

    ordinal: int
    question: str
    ids: np.ndarray
    domain: str = ""
    answer: str | None = None
    responses: tuple[np.ndarray | Trajectory, ...] = ()
    first_sample: int = 0
    begun: int = 0

    def samples(self, count: int) -> range:
        return range(self.first_sample, self.first_sample + count)


def part_of(sample: int, samples: int) -> int:
    """The loss (objective.parts) that a sample is for, where each has so many of a prompt."""
    return sample // samples


def longest_response(prompt: Prompt, max_new_tokens: int, caps: dict[str, int], block_size: int) -> int:
    """The longest response to a prompt, in tokens, under the limits by domain: to the end of the block in which it is
    reached, since every position of a block is trained. What is begun counts, and is no part of it."""
    tokens = min(max_new_tokens, caps.get(prompt.domain, max_new_tokens))
    return grid_ceil(len(prompt.ids) - prompt.begun + tokens, block_size) - len(prompt.ids)


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the run's order, and the offline responses and the rollouts of an earlier run by question.

    Of the `read` rows of the source `dropped` counts those that were left out by reason; `notes` are sentences on how
    it was read. No copy of a prompt of `held_out` is among `prompts`.
    """

    prompts: list[Prompt]
    read: int
    dropped: dict[str, int]
    held_out: list[Prompt] = field(default_factory=list)
    responses: dict[str, list[np.ndarray]] = field(default_factory=dict)
    trajectories: dict[str, list[Trajectory]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A row of a source before tokenising: `question` names it, `conversation` is what the model is asked."""

    place: str
    question: str
    conversation: Conversation
    domain: str = ""
    answer: str | None = None


def load_prompts(data: DataConfig, tokenizer: Any, seed: int | None, held_out: int | list[Prompt] = 0) -> PromptSet:
    """Read, tokenise, leave out what cannot be used, and order by `seed` (None: as read), epoch by epoch.

    `held_out` prompts are taken out of the training with all their copies: so many different ones from the end of the
    seeded order, where data.limit would leave them out first, or those that an earlier part of the run has held out.

    Raises:
        PromptError: see open_rows and read_rows; a prompt does not hold its question; or nothing is left.
    """
    return _load(data, tokenizer, seed, held_out, with_answers=False)


def load_problems(data: DataConfig, tokenizer: Any, count: int) -> PromptSet:
    """The first `count` problems, in the order of their source; those without an answer are left out and counted.

    Raises:
        PromptError: as load_prompts; or no problem has an answer.
    """
    once = {"epochs": 1, "limit": count, "max_prompt_tokens": 10**9, "drop_duplicates": False}
    return _load(data.model_copy(update=once), tokenizer, None, with_answers=True)


def hinted_ids(
    data: DataConfig, tokenizer: Any, hint_of: Callable[[str], str], wanted: set[str]
) -> dict[str, np.ndarray]:
    """For each question of `wanted` that has an answer, int32 ids of its prompt with the hint `hint_of(answer)` behind
    it.

    Raises:
        PromptError: as load_prompts.
    """
    left_out = Counter[str]()
    rows = [
        replace(row, conversation=row.conversation.with_hint(hint_of(row.answer)))
        for row in read_rows(open_rows(data.prompts, data.split, data.subset), data, left_out)
        if row.answer is not None and row.question in wanted
    ]
    ids = tokenised(rows, ChatTemplate(tokenizer, enable_thinking=data.enable_thinking), left_out)
    return {row.question: found for row, found in zip(rows, ids, strict=True) if found is not None}


def prompt_ids(tokenizer: Any, question: str, *, enable_thinking: bool = False) -> np.ndarray:
    """int32 ids of one user turn with the chat template and the generation prompt."""
    chat = ChatTemplate(tokenizer, enable_thinking=enable_thinking)
    return chat.ids([chat.text(Conversation((Turn("user", question),), "question"))])[0]


def render(
    source: Iterable[tuple[str, dict[str, Any]]], data: DataConfig, tokenizer: Any, *, raw: bool = False
) -> list[Prompt]:
    """A prompt for every row, in their order; `raw`: without the chat template.

    Raises:
        PromptError: see read_rows; a row holds no prompt, or a prompt cannot be used.
    """
    left_out = Counter[str]()
    rows: list[Row] = []
    for place, record in source:
        rows.extend(read_rows([(place, record)], data, left_out))
        if left_out:
            raise PromptError(f"{place}: no prompt ({next(iter(left_out))}); fix or remove the row")
    chat = ChatTemplate(tokenizer, enable_thinking=data.enable_thinking, raw=raw)
    prompts: list[Prompt] = []
    for row, ids in zip(rows, tokenised(rows, chat, left_out), strict=True):
        if ids is None:
            raise PromptError(f"{row.place}: {next(iter(left_out))}; fix or remove the row")
        if tokenizer.mask_token_id is not None and tokenizer.mask_token_id in ids:
            raise PromptError(f"{row.place}: the prompt holds the mask token {tokenizer.mask_token!r}; remove it")
        prompts.append(Prompt(len(prompts), row.question, ids, row.domain, row.answer))
    return prompts


def _load(
    data: DataConfig, tokenizer: Any, seed: int | None, held_out: int | list[Prompt] = 0, *, with_answers: bool
) -> PromptSet:
    dropped = Counter[str]()
    source = open_rows(data.prompts, data.split, data.subset)
    rows = list(read_rows(source, data, dropped, with_answers))
    total = len(rows) + dropped.total()
    notes = [*source.notes, *_form_notes(rows, data)]
    if data.enable_thinking and not has_thinking_switch(tokenizer):
        notes.append("data.enable_thinking changes nothing: the chat template has no switch for it")
    kept: list[tuple[Row, np.ndarray]] = []
    seen: set[bytes] = set()
    for row, ids in zip(rows, tokenised(rows, ChatTemplate(tokenizer, enable_thinking=data.enable_thinking), dropped)):
        if ids is None:
            continue
        copy = ids.tobytes() in seen
        seen.add(ids.tobytes())
        if len(ids) > data.max_prompt_tokens:
            dropped[f"longer than {data.max_prompt_tokens} tokens"] += 1
        elif tokenizer.mask_token_id is not None and tokenizer.mask_token_id in ids:
            dropped[f"holds the mask token {tokenizer.mask_token!r}"] += 1
        elif copy and data.drop_duplicates:
            dropped["exact copy of an earlier prompt"] += 1
        else:
            kept.append((row, ids))
    if not kept:
        reasons = "; ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise PromptError(f"{data.prompts!r}: none of {total} rows can be used ({reasons}); {_remedy(dropped, data)}")
    copies = len(kept) - len({ids.tobytes() for _, ids in kept})
    if copies:
        notes.append(
            f"{copies} of {len(kept)} prompts are exact copies of earlier ones; data.drop_duplicates drops them"
        )
    prompts: list[Prompt] = []
    order = _order(len(kept), seed, 0)
    if isinstance(held_out, int):
        held_out = _from_the_end(kept, order, held_out)
    if held_out:
        never = {prompt.ids.tobytes() for prompt in held_out}
        order = np.array([index for index in order if kept[index][1].tobytes() not in never], dtype=np.int64)
        taken = len(kept) - len(order)
        notes.append(f"{taken} prompts are held out of the training, {len(held_out)} different ones")
        if not len(order):
            raise PromptError(
                f"{data.prompts!r} has {len(held_out)} different prompts that can be used, and "
                f"evaluation.held_out_prompts takes them all; give more prompts, or lower evaluation.held_out_prompts "
                f"to {len(held_out) - 1} or less"
            )
    chosen = order[: data.limit]
    for epoch in range(data.epochs):
        order = chosen if epoch == 0 else chosen[_order(len(chosen), seed, epoch)]
        for index in order:
            row, ids = kept[index]
            prompts.append(Prompt(len(prompts), row.question, ids, row.domain, row.answer))
    return PromptSet(prompts, total, dict(dropped), held_out, notes=tuple(notes))


def _from_the_end(kept: list[tuple[Row, np.ndarray]], order: np.ndarray, count: int) -> list[Prompt]:
    """The last `count` different prompts of an order, the last one first; fewer where there are fewer."""
    found: dict[bytes, Prompt] = {}
    for index in order[::-1]:
        if len(found) == count:
            break
        row, ids = kept[index]
        found.setdefault(ids.tobytes(), Prompt(len(found), row.question, ids, row.domain, row.answer))
    return list(found.values())


def _remedy(dropped: Counter[str], data: DataConfig) -> str:
    reason = dropped.most_common(1)[0][0]
    if reason.startswith("longer"):
        return "raise data.max_prompt_tokens"
    if reason.startswith("no answer"):
        return f"add answers, or set data.answer_field ({data.answer_field!r}) to the field that holds them"
    return "give other prompts, or set data.question_field to the field that holds the prompt"


def _order(count: int, seed: int | None, epoch: int) -> np.ndarray:
    """int64 [count]: an epoch's order."""
    return np.arange(count) if seed is None else np.random.default_rng([seed, epoch]).permutation(count)


def read_rows(
    source: Iterable[tuple[str, dict[str, Any]]],
    data: DataConfig,
    dropped: Counter[str],
    with_answers: bool = False,
) -> Iterator[Row]:
    """The rows as questions, with templates and the system turn; those that hold no prompt are counted in `dropped`.

    Raises:
        PromptError: a row has no text in the field of the question, or text that is no Unicode.
    """
    for place, record in source:
        try:
            conversation = conversation_of(place, record, data)
        except LeftOut as reason:
            dropped[str(reason)] += 1
            continue
        answer = reference_text(record.get(data.answer_field))
        answer = answer and whole_characters(answer)
        if with_answers and answer is None:
            dropped["no answer (missing, empty, null or NaN)"] += 1
            continue
        domain = whole_characters(str(record.get(data.domain_field) or ""))
        asked = conversation.asked(template_for(domain, data.templates), data.system)
        yield Row(place, conversation.question, asked, domain, answer)


def _form_notes(rows: list[Row], data: DataConfig) -> list[str]:
    forms = Counter(row.conversation.form for row in rows if row.conversation.form != data.question_field)
    notes = [f"{count} of {len(rows)} rows are read from the field {form!r}" for form, count in forms.items()]
    starts = sum(row.conversation.starts_response for row in rows)
    responses = sum(row.conversation.response_left_out for row in rows)
    for count, what in (
        (starts, "the start of the assistant's turn, which the response goes on with"),
        (responses, "a response of the assistant, which is left out of the prompt"),
    ):
        if count:
            notes.append(f"{count} of {len(rows)} rows end with {what} (data.assistant_turn: {data.assistant_turn})")
    return notes


def tokenised(rows: list[Row], chat: ChatTemplate, dropped: Counter[str]) -> list[np.ndarray | None]:
    """int32 ids of every row; None for one that the chat template refuses, which is counted in `dropped`.

    Raises:
        PromptError: the template refuses all rows, or a prompt does not hold its question.
    """
    texts: list[str | None] = []
    refusals = Counter[str]()
    for row in rows:
        try:
            texts.append(chat.text(row.conversation))
        except TEMPLATE_ERRORS as error:
            if isinstance(error, PromptError):
                raise PromptError(f"{row.place}: {error}") from error
            texts.append(None)
            refusals[f"the chat template refuses it: {' '.join(str(error).split())}"] += 1
    if rows and refusals.total() == len(rows):
        reason, count = refusals.most_common(1)[0]
        raise PromptError(
            f"{count} of {len(rows)} prompts: {reason}; fix the tokenizer's chat_template, or give the turns that it "
            "wants (data.system adds a system turn)"
        )
    dropped.update(refusals)
    failed: list[tuple[Row, Turn, str]] = []
    result: list[np.ndarray | None] = []
    for first in range(0, len(rows), _CHUNK):
        part = [text for text in texts[first : first + _CHUNK] if text is not None]
        found = iter(chat.ids(part))
        for row, text in zip(rows[first : first + _CHUNK], texts[first : first + _CHUNK], strict=True):
            if text is None:
                result.append(None)
                continue
            ids = next(found)
            decoded = chat.tokenizer.decode(ids)
            missing = missing_turn(chat.tokenizer, row.conversation, decoded)
            if missing is None and len(ids) <= chat.empty_length(row.conversation):
                missing = row.conversation.turns[-1]
            if missing:
                failed.append((row, missing, decoded))
            result.append(ids)
    if failed:
        row, turn, decoded = failed[0]
        raise PromptError(
            f"{len(failed)} of {len(rows)} prompts ({len(failed) / len(rows):.1%}) do not hold their question: "
            f"{row.place}, the {turn.role}'s words {_short(turn.text)} are not in {_short(decoded)}; the tokenizer's "
            "files are incomplete or its chat template does not fit: bring tokenizer.json and the chat template from "
            "the model's source again"
        )
    return result


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:97]}...")
