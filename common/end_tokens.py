"""The end tokens of a model: what ends a response, wherever one is made or read.

A model may have several, and no single file names them all: the tokenizer's eos, `eos_token_id` of the generation
config (a number or a list), and what the chat template writes behind an answer. Gemma 3 and Llama 3 end a turn with
another token than the tokenizer's eos; whoever looks for that one alone lets responses run on. All of them end a
response; the first, the one that ends a turn where there is a chat template, is put behind a response that comes as
text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import GenerationConfig

from common.chat import TEMPLATE_ERRORS, as_messages
from common.conversations import Turn
from common.model_files import ModelError
from common.trajectory import EndTokens, without_end

_QUESTION, _ANSWER, _NEXT = "first question", "certain answer", "second question"
_BEFORE: tuple[list[tuple[str, str]], ...] = ([], [("system", "")])  # some templates ask for a system turn
_REMEDY = "name the tokens that end a response with model.end_tokens (convert: --end-token)"


def end_token_ids(tokenizer: Any, generation_config: Any, named: Sequence[str] | None = None) -> tuple[int, ...]:
    """The ids of all end tokens, the one that ends a turn first; `named` are taken in place of what the files say.

    Raises:
        ModelError: there is none, a named token does not exist, or the chat template writes none of them.
    """
    if named:
        return tuple(dict.fromkeys(_id_of(tokenizer, token) for token in named))
    ends, behind = _found(tokenizer, generation_config)
    if behind and not ends.turn_end:
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(number)) for number in ends.others)
        raise ModelError(
            f"has a chat template that writes no end token behind an answer (it writes {behind[0]!r}; end tokens are "
            f"{names or 'not named'}), so responses would not end; correct the template, or {_REMEDY}"
        )
    if not ends.all:
        raise ModelError(f"has no end token in its tokenizer, generation config or chat template; {_REMEDY}")
    return ends.all


def known_end_tokens(tokenizer: Any, generation_config: Any) -> tuple[int, ...]:
    """As `end_token_ids`, of a model whose own chat template is not used: there may be none."""
    return _found(tokenizer, generation_config)[0].all


def set_end_tokens(model: Any, tokenizer: Any, ends: Sequence[int] | None = None) -> None:
    """Give a loaded model a generation config with all its end tokens and nothing else: what else its own says (a
    repetition penalty, a temperature) is no part of the model's distribution.

    They are `ends`, else those that its config records, if it is a student, else those of `end_token_ids`.

    Raises:
        ModelError: see `end_token_ids`.
    """
    ends = ends or getattr(model.config, "end_token_ids", None) or end_token_ids(tokenizer, model.generation_config)
    model.generation_config = GenerationConfig(eos_token_id=list(ends), pad_token_id=ends[0])


def response_text(tokenizer: Any, response_ids: np.ndarray, end_tokens: EndTokens) -> str:
    """What a response says, without its end token, whether that is a special token or not."""
    return str(tokenizer.decode(without_end(response_ids, end_tokens), skip_special_tokens=True))


@dataclass(frozen=True)
class _Ends:
    """`turn_end`, at most one, is what the chat template writes behind an answer."""

    turn_end: tuple[int, ...]
    others: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((*self.turn_end, *self.others)))


def _found(tokenizer: Any, generation_config: Any) -> tuple[_Ends, tuple[str, str] | None]:
    """What the files say, and what `_behind_an_answer` does."""
    listed = generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(listed if isinstance(listed, list | tuple) else [listed])]
    exist = set(tokenizer.get_vocab().values())
    known = tuple(dict.fromkeys(int(number) for number in ids if isinstance(number, int) and number in exist))
    behind = _behind_an_answer(tokenizer)
    return _Ends(_turn_end(tokenizer, behind, set(known)) if behind else (), known), behind


def _id_of(tokenizer: Any, token: str) -> int:
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        raise ModelError(f"has no token {token!r}, which model.end_tokens names; name tokens of its tokenizer")
    return int(vocabulary[token])


def _turn_end(tokenizer: Any, behind: tuple[str, str], known: set[int]) -> tuple[int, ...]:
    """The first token behind an answer that is special or known to end, in a conversation that ends there; else the
    first known one before the next turn (some models end with the token that begins it)."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for text, ends in zip(behind, (special | known, known), strict=True):
        for number in tokenizer(text, add_special_tokens=False)["input_ids"]:
            if number in ends:
                return (int(number),)
    return ()


def _behind_an_answer(tokenizer: Any) -> tuple[str, str] | None:
    """What the chat template writes behind an answer at the end, and between an answer and the next question; None
    without a template, or where it takes no answer."""
    if tokenizer.chat_template is None:
        return None
    turns = [("user", _QUESTION), ("assistant", _ANSWER), ("user", _NEXT)]
    for before in _BEFORE:
        for as_parts in (False, True):
            last, middle = (_tried(tokenizer, [*before, *turns[:count]], as_parts) for count in (2, 3))
            if _ANSWER in last or _ANSWER in middle:
                return last.rpartition(_ANSWER)[2], middle.rpartition(_ANSWER)[2].partition(_NEXT)[0]
    return None


def check_chat_template(tokenizer: Any) -> None:
    """Refuse a chat template with which no question can be asked; none is fine.

    Raises:
        ModelError: it raises or does not parse, or leaves out what the user says, with and without a system turn.
    """
    if tokenizer.chat_template is None:
        return
    failed: Exception | None = None
    for before in _BEFORE:
        for as_parts in (False, True):
            try:
                if _QUESTION in _rendered(tokenizer, [*before, ("user", _QUESTION)], as_parts):
                    return
            except TEMPLATE_ERRORS as error:
                failed = failed or error
    reason = f"raises {type(failed).__name__} ({failed})" if failed else "leaves out what the user says"
    raise ModelError(f"has a chat template that {reason}; take the one that belongs to the model, or correct it")


def _tried(tokenizer: Any, turns: list[tuple[str, str]], as_parts: bool) -> str:
    """The conversation as the chat template writes it; empty where it refuses it."""
    try:
        return _rendered(tokenizer, turns, as_parts)
    except TEMPLATE_ERRORS:
        return ""


def _rendered(tokenizer: Any, turns: list[tuple[str, str]], as_parts: bool) -> str:
    """The conversation of (role, text), as texts or as lists of parts."""
    messages = as_messages([Turn(role, text) for role, text in turns], as_parts)
    return str(tokenizer.apply_chat_template(messages, tokenize=False))
