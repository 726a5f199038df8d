"""From a row to the turns of a prompt, in the forms in which people publish them.

| fields of the row | read as |
| --- | --- |
| data.question_field with text | one user turn |
| data.question_field or `prompt` with a list, `messages`, `conversations`, `conversation` | turns (OpenAI's `role` and `content`, ShareGPT's `from` and `value`) |
| `instruction`, `input` | one user turn, the input behind the instruction (Alpaca); `system` and `history` before it |

A prompt ends with a user turn, or with the start of the assistant's turn. Where a row ends with an assistant turn, that
one is either the whole response, which is left out, or a start, which is kept: `data.assistant_turn` says which. Its
default `auto` takes as a start what is marked (`"prefix": true`), stands in the field `prompt` (as in TRL), or ends
openly: in a code block or a <think> that is not closed, or with a space, a colon, a comma or a bracket.
"""  # noqa: E501 (a table)

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from common.config.data import DataConfig
from common.datasets.errors import PromptError

DEFAULT_TEMPLATE = "default"  # the key of data.templates for all other domains
QUESTION = "{question}"
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_LISTS = ("messages", "conversations", "conversation", "prompt")
_TURNS_AS_TEXT = re.compile(r'\s*\[\s*\{\s*"(?:role|from|content|value)"\s*:')
_OPEN_END = re.compile(r"[ \t:,(\[{]\Z")


class LeftOut(Exception):  # noqa: N818 (an outcome, not an error)
    """The row is whole but no prompt; the message is the reason, the same for all rows of its kind."""


@dataclass(frozen=True)
class Turn:
    """`role` is system, user or assistant."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """The turns of a prompt; `form` is the field of the row that they come from.

    `response_left_out`: the row goes on with the assistant's response, which is no part of the prompt.
    """

    turns: tuple[Turn, ...]
    form: str
    response_left_out: bool = False

    @property
    def question(self) -> str:
        """The user's words; of several turns, all of them with their roles. It identifies the prompt."""
        if len(self.turns) == 1:
            return self.turns[0].text
        return "\n\n".join(f"{turn.role}: {turn.text}" for turn in self.turns)

    @property
    def starts_response(self) -> bool:
        """Whether the last turn is the start of the assistant's."""
        return self.turns[-1].role == "assistant"

    def asked(self, template: str, system: str | None) -> Conversation:
        """With the template around the last user turn, and a system turn where the row brings none."""
        asked = self._with_last_question(lambda text: template.replace(QUESTION, text))
        if system and asked.turns[0].role != "system":
            return replace(asked, turns=(Turn("system", system), *asked.turns))
        return asked

    def with_hint(self, hint: str) -> Conversation:
        """With a paragraph more at the end of the last user turn."""
        return self._with_last_question(lambda text: f"{text}\n\n{hint}")

    def _with_last_question(self, changed: Callable[[str], str]) -> Conversation:
        last = max(i for i, turn in enumerate(self.turns) if turn.role == "user")
        turns = list(self.turns)
        turns[last] = replace(turns[last], text=changed(turns[last].text))
        return replace(self, turns=tuple(turns))

    def with_words(self, words: str) -> Conversation:
        """The same turns, each with these words instead of its own."""
        return replace(self, turns=tuple(replace(turn, text=words) for turn in self.turns))


def template_for(domain: str, templates: Mapping[str, str]) -> str:
    """The template of a domain, else the default one, else the bare question."""
    return templates.get(domain, templates.get(DEFAULT_TEMPLATE, QUESTION))


def conversation_of(place: str, record: dict[str, Any], data: DataConfig) -> Conversation:
    """The conversation of a row, before templates.

    Raises:
        PromptError: the row has no text where it should, or text that is no Unicode.
        LeftOut: it holds no prompt.
    """
    found = _find(place, record, data)
    for turn in found.turns:
        check_text(place, turn.text)
    return found


def _find(place: str, record: dict[str, Any], data: DataConfig) -> Conversation:
    field = data.question_field
    value = _listed(record.get(field))
    if isinstance(value, str) and value.strip():
        return Conversation((Turn("user", value),), field)
    names = (field,) if field != DataConfig.model_fields["question_field"].default else (field, *_LISTS)
    for name in names:
        entries = _listed(record.get(name))
        if isinstance(entries, list):
            return _from_list(place, name, entries, record.get("system"), data)
    if len(names) > 1 and isinstance(record.get("instruction"), str) and record["instruction"].strip():
        return _from_instruction(place, record)
    found = "" if value is None or isinstance(value, str) else f", but {type(value).__name__}"
    raise PromptError(
        f"{place}: no text in field {field!r}{found}; the record has {sorted(record)}. "
        "Set data.question_field to the field that holds the prompt"
    )


def _listed(value: Any) -> Any:
    """Turns that are stored as JSON text, as CSV and some Parquet files have them, as a list; other values as is."""
    if isinstance(value, str) and _TURNS_AS_TEXT.match(value):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _from_list(place: str, name: str, entries: list[Any], system: Any, data: DataConfig) -> Conversation:
    turns = [_turn(f"{place}, turn {i} of {name!r}", entry) for i, entry in enumerate(entries, start=1)]
    if isinstance(system, str) and system.strip() and turns and turns[0].role != "system":
        turns.insert(0, Turn("system", system))
    given = len(turns)
    if turns and turns[-1].role == "assistant":
        kept = data.assistant_turn == "start" or (
            data.assistant_turn == "auto" and (name == "prompt" or _is_start(entries[-1], turns[-1].text))
        )
        while not kept and turns and turns[-1].role == "assistant":
            turns.pop()
    if not any(turn.role == "user" and turn.text.strip() for turn in turns):
        raise LeftOut("no user turn")
    if turns[-1].role == "system" or not turns[-1].text.strip():
        raise LeftOut("the last turn is empty or a system turn")
    return Conversation(tuple(turns), name, response_left_out=len(turns) < given)


def _turn(place: str, entry: Any) -> Turn:
    if not isinstance(entry, dict) or not ({"role", "from"} & entry.keys()):
        raise PromptError(
            f"{place}: expected an object with 'role' and 'content' or 'from' and 'value', found {entry!r}"
        )
    role = entry.get("role", entry.get("from"))
    text = entry.get("content", entry.get("value"))
    if isinstance(text, list):  # content as parts
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in text):
            raise LeftOut("a turn with other parts than text")
        text = "".join(part["text"] for part in text)
    if str(role).lower() not in _ROLES:
        raise LeftOut(f"a turn of role {role!r}")
    if not isinstance(text, str):
        raise LeftOut("a turn without text")
    return Turn(_ROLES[str(role).lower()], text)


def _is_start(entry: dict[str, Any], text: str) -> bool:
    """Whether an assistant turn looks like the start of one rather than the whole."""
    unclosed = text.count("```") % 2 == 1 or text.count("<think>") > text.count("</think>")
    return bool(entry.get("prefix")) or unclosed or bool(_OPEN_END.search(text))


def _from_instruction(place: str, record: dict[str, Any]) -> Conversation:
    extra = record.get("input")
    text = f"{record['instruction']}\n\n{extra}" if isinstance(extra, str) and extra.strip() else record["instruction"]
    turns = [Turn("user", text)]
    for pair in reversed(record.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise PromptError(f"{place}: expected pairs of texts in field 'history', found {pair!r}")
        turns[:0] = [Turn("user", pair[0]), Turn("assistant", pair[1])]
    system = record.get("system")
    if isinstance(system, str) and system.strip():
        turns.insert(0, Turn("system", system))
    return Conversation(tuple(turns), "instruction")


def whole_characters(text: str) -> str:
    """The text with a question mark for each surrogate without its pair, which no file of text can hold."""
    return text.encode(errors="replace").decode()


def check_text(place: str, text: str) -> None:
    """Refuse text that is no Unicode, which no tokenizer takes.

    Raises:
        PromptError: names the place and the character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{place}: the text holds half a character, {text[error.start]!r} (a surrogate without its pair); "
            "fix or remove the row"
        ) from error
