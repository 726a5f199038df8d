"""From conversations to token ids: the chat template, and the check that a prompt holds its question."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError

from common.config.data import DataConfig
from common.conversations import Conversation, Turn
from common.datasets.errors import PromptError

# fields of the data section that say how a student was asked: kept in its config.json under the key `opdlm`
ASKED_WITH = {"enable_thinking", "system", "templates"}
# of Jinja, of expressions in a template, of transformers
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
_PROBE = "question"


def asked_with(data: DataConfig) -> dict[str, Any]:
    """What a checkpoint records of its prompts, as `opdlm` in its config.json; `eval` asks in the same way."""
    return data.model_dump(include=ASKED_WITH)


def template_options(enable_thinking: bool) -> dict[str, bool]:
    """What a chat template is told besides the turns; Granite and DeepSeek call it `thinking`."""
    return {"enable_thinking": enable_thinking, "thinking": enable_thinking}


def has_thinking_switch(tokenizer: Any) -> bool:
    """Whether the chat template reads what `template_options` says."""
    return "thinking" in str(tokenizer.chat_template)


def as_messages(turns: Iterable[Turn], as_parts: bool) -> list[dict[str, Any]]:
    """The turns as chat templates take them: content as text, or as a list of parts."""
    return [
        {"role": turn.role, "content": [{"type": "text", "text": turn.text}] if as_parts else turn.text}
        for turn in turns
    ]


class ChatTemplate:
    """A tokenizer's chat template: conversations in, texts and ids out.

    Content is given as text, or as a list of parts where the template reads it so. Without a chat template (base
    models) and with `raw`, a prompt is the user's text alone, behind the tokenizer's begin-of-sequence token where it
    adds one.
    """

    def __init__(self, tokenizer: Any, *, enable_thinking: bool = False, raw: bool = False) -> None:
        self.tokenizer = tokenizer
        self.raw = raw or tokenizer.chat_template is None
        self._options = template_options(enable_thinking)
        self._parts: bool | None = None  # whether content goes in as parts; None: not known yet
        self._begin = _begin(tokenizer) if self.raw else ()
        self._empty: dict[tuple[str, ...], int] = {}

    def text(self, conversation: Conversation) -> str:
        """The prompt's text.

        Raises:
            TemplateError, TypeError, ValueError: the template refuses this conversation.
            PromptError: it leaves out what the user says; or there is none and the prompt is more than a user turn.
        """
        if self.raw:
            return self._raw_text(conversation)
        if self._parts is None:
            self._parts = self._takes_parts(conversation)
        return self._rendered(conversation, self._parts)

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text; special tokens stand in it already."""
        if not texts:
            return []
        rows = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [np.asarray([*self._begin, *row], dtype=np.int32) for row in rows]

    def empty_length(self, conversation: Conversation) -> int:
        """Tokens that the template makes of the same turns without words; 0 where it refuses these."""
        roles = tuple(turn.role for turn in conversation.turns)
        if roles not in self._empty:
            try:
                self._empty[roles] = len(self.ids([self.text(conversation.with_words(""))])[0])
            except TEMPLATE_ERRORS:
                self._empty[roles] = 0
        return self._empty[roles]

    def _raw_text(self, conversation: Conversation) -> str:
        if [turn.role for turn in conversation.turns] != ["user"]:
            raise PromptError(
                "without a chat template a prompt is one user turn; this one has "
                f"{', '.join(turn.role for turn in conversation.turns)}: set data.chat_template, or drop the others"
            )
        return conversation.turns[0].text

    def _takes_parts(self, conversation: Conversation) -> bool:
        """Tried on a conversation of the kind that is to be rendered."""
        probe = conversation.with_words(_PROBE)
        failed: Exception | None = None
        for parts in (False, True):
            try:
                if _PROBE in self._rendered(probe, parts):
                    return parts
            except TEMPLATE_ERRORS as error:
                failed = failed or error
        if failed:
            raise failed
        raise PromptError(
            "the tokenizer's chat template leaves out what the user says, given as text and as a list of parts; use "
            "the chat template that belongs to the model"
        )

    def _rendered(self, conversation: Conversation, parts: bool) -> str:
        start = conversation.starts_response
        return str(
            self.tokenizer.apply_chat_template(
                as_messages(conversation.turns, parts),
                tokenize=False,
                add_generation_prompt=not start,
                continue_final_message=start,
                **self._options,
            )
        )


def missing_turn(tokenizer: Any, conversation: Conversation, prompt: str) -> Turn | None:
    """The first turn whose words a decoded prompt does not contain, up to what the tokenizer normalises.

    Compared without white space, case and compatibility forms; where that fails, with what the tokenizer makes of the
    words alone, of which at least half must be left.
    """
    squeezed = ""
    for turn in conversation.turns:
        if turn.role == "assistant" and turn is not conversation.turns[-1]:
            continue  # templates may leave out what was thought in earlier turns
        if turn.text.strip() in prompt:
            continue
        squeezed = squeezed or _squeezed(prompt)
        words = _squeezed(turn.text)
        if words in squeezed:
            continue
        kept = _squeezed(tokenizer.decode(tokenizer(turn.text, add_special_tokens=False)["input_ids"]))
        known = kept.replace(_squeezed(tokenizer.unk_token or ""), "") if tokenizer.unk_token else kept
        if kept not in squeezed or 2 * len(known) < len(words):
            return turn
    return None


def _squeezed(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _begin(tokenizer: Any) -> tuple[int, ...]:
    """The begin-of-sequence token, where the tokenizer puts it before a text."""
    ids = tokenizer("")["input_ids"]
    return (tokenizer.bos_token_id,) if ids[:1] == [tokenizer.bos_token_id] else ()
