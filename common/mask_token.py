"""The mask token of a student: which token it is, and whether its embedding row exists.

| model.mask_token | the mask token is |
| --- | --- |
| `auto` | the tokenizer's own; else `<|mask|>`, new in a spare embedding row; else a token that is in reserve |
| `new` | `<|mask|>`, new, for which a row is added to embedding and LM head where none is spare |
| any other text | this token, which the tokenizer has, or which becomes new in a spare embedding row |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from common.model_files import ModelError

AUTO, NEW = "auto", "new"
_NAME = "<|mask|>"
_ROWS_STEP = 64  # rows are added up to a multiple of this, so that products with the LM head stay as fast
# what tokenizers keep in reserve, then what stands in no text of a chat: the first kind that is there is taken
_RESERVED = (
    r"<\|?mask\|?>|\[MASK\]",  # there, but not declared
    r"<\|reserved_special_token_\d+\|>",  # Llama 3
    r"<\|?reserved_?\d+\|?>",
    r"[<\[]\|?unused_?(token_)?\d+\|?[>\]]",  # Gemma, InternLM
    r"<SPECIAL_\d+>",  # Mistral
    r"\[control_\d+\]",
    r"<\|?(dummy|extra|placeholder)_?(token_?|id_?)?\d+\|?>",
    r"<.place.holder.no.\d+.>",  # DeepSeek
    r"<empty_output>",  # SmolLM2
    r"<\|?fim_?pad\|?>",
    r"<gh_stars>",
    r"<jupyter_\w+>",
    r"<issue_\w+>",
    r"<\|?fim_?(middle|prefix|suffix)\|?>",
)
_REMEDY = "name a token that never occurs as the mask token, or `new`, which adds a row"


@dataclass(frozen=True)
class MaskToken:
    """`rows` is what embedding and LM head need; `note` says what was chosen where nobody named it."""

    token: str
    id: int
    rows: int
    note: str = ""


def set_mask_token(tokenizer: Any, wanted: str, rows: int, kept: set[int]) -> MaskToken:
    """Choose the mask token and make it the tokenizer's.

    Args:
        wanted: `auto`, `new` or a token.
        rows: of the embedding.
        kept: ids that have another use; that of padding may be named, but is not chosen.

    Raises:
        ModelError: there is no such token, no row for it, or it has another use.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if wanted == AUTO and tokenizer.mask_token_id is not None and tokenizer.mask_token_id < rows:
        return MaskToken(tokenizer.mask_token, tokenizer.mask_token_id, rows)
    spare = max(vocabulary.values()) + 1
    if wanted == NEW:
        grown = rows if spare < rows else -(-(spare + 1) // _ROWS_STEP) * _ROWS_STEP
        return _added(tokenizer, _free_name(vocabulary), grown, rows)
    if wanted != AUTO and wanted not in vocabulary:
        if spare >= rows:
            raise ModelError(
                f"has no token {wanted!r} and no spare row for it: all {rows} rows of the embedding are used; {_REMEDY}"
            )
        return _added(tokenizer, wanted, rows, rows)
    if wanted == AUTO and spare < rows and _NAME not in vocabulary:
        return _added(tokenizer, _NAME, rows, rows)
    token = _reserved(tokenizer, vocabulary, rows, kept) if wanted == AUTO else wanted
    if token is None:
        raise ModelError(
            f"has no room for a mask token: all {rows} rows of the embedding are used, and no token is reserved; "
            f"{_REMEDY}"
        )
    if reason := _other_use(tokenizer, token, vocabulary[token], rows, kept):
        raise ModelError(f"cannot have {token!r} as its mask token: {reason}; {_REMEDY}")
    tokenizer.add_special_tokens({"mask_token": token})
    note = f"the mask token is {token!r} (id {vocabulary[token]}), which no text should hold" if wanted == AUTO else ""
    return MaskToken(token, vocabulary[token], rows, note)


def _added(tokenizer: Any, token: str, rows: int, before: int) -> MaskToken:
    tokenizer.add_special_tokens({"mask_token": token})
    new = int(tokenizer.mask_token_id)
    grown = f"; embedding and LM head grow from {before} to {rows} rows" if rows > before else ""
    return MaskToken(token, new, rows, f"the mask token is {token!r}, new with id {new}{grown}")


def _free_name(vocabulary: dict[str, int]) -> str:
    return next(name for name in (_NAME, *(f"<|mask_{i}|>" for i in range(len(vocabulary)))) if name not in vocabulary)


def _reserved(tokenizer: Any, vocabulary: dict[str, int], rows: int, kept: set[int]) -> str | None:
    by_id = sorted(vocabulary.items(), key=lambda item: item[1])
    for pattern in _RESERVED:
        for token, number in by_id:
            if number == tokenizer.pad_token_id or not re.fullmatch(pattern, token, re.IGNORECASE):
                continue
            if not _other_use(tokenizer, token, number, rows, kept):
                return token
    return None


def _other_use(tokenizer: Any, token: str, number: int, rows: int, kept: set[int]) -> str:
    """Why the token cannot be the mask, if there is a reason."""
    if number >= rows:
        return f"its id {number} is beyond the {rows} rows of the embedding"
    if number in kept:
        return "it begins or ends a text, or stands for what is unknown"
    if token in str(tokenizer.chat_template or ""):
        return "the chat template writes it"
    if tokenizer(token, add_special_tokens=False)["input_ids"] != [number]:
        return "its text is not read as this one token"
    return ""
