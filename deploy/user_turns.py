"""`opdlm prompts`: user turns that an instruct model writes itself, as a Parquet file for `data.prompts`.

The model gets its own chat template up to the point where the user's words begin, and goes on; what it writes up to the
end of the turn is a prompt. (As Magpie does: Xu et al., arXiv 2406.08464.) So a model can be converted without any data
set. Turns are sampled in parts, in a seeded order; each part is written to FILE.parts at once, so that an interrupted
command goes on where it stood, and in the order of parts what cannot be used is dropped and counted. The file has the
field `question`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from actors.responder import ResponseRequest, Sampling
from common.chat import TEMPLATE_ERRORS, ChatTemplate
from common.config.errors import ConfigError
from common.config.run import RunConfig
from common.conversations import Conversation, Turn
from common.conversion import end_tokens_of
from common.student import check_family, load_config, load_tokenizer
from common.trajectory import finish_reason, without_end
from common.vocabulary import token_count
from deploy.cluster import connect
from deploy.model_checks import check_model_folder, model_errors
from deploy.near_duplicates import NearDuplicates
from deploy.part_files import PartFiles
from deploy.responders import check_engine, check_room, generated

_WORDS = "words of the user"  # stand where the user's words do
_MOST_SAMPLES = 8  # times the prompts that are wanted; a model that needs more writes nothing usable
_BATCHED_PART = 1024  # turns for an engine that runs as many as fit, one leaving as another joins
NEAR_DUPLICATE = "near-duplicate of an earlier one"


@dataclass(frozen=True)
class UserTurn:
    """Where a user turn begins and ends in a model's chat template.

    `prefix`, int32: the template up to the user's words. A turn ends with a token of `end_tokens`, or, where the
    template ends it with plain text, before `marker` (else empty). It holds none of the `special` tokens.
    """

    prefix: np.ndarray
    end_tokens: tuple[int, ...]
    marker: str
    special: frozenset[int]


@dataclass
class Written:
    """The prompts, of `samples` turns; `dropped` counts the others by reason."""

    wanted: int
    prompts: list[str] = field(default_factory=list)
    samples: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    _seen: NearDuplicates = field(default_factory=NearDuplicates)

    @property
    def enough(self) -> bool:
        return len(self.prompts) == self.wanted

    def take(self, table: pa.Table) -> None:
        """The turns of a part in their order, until there are enough."""
        for question, reason in zip(table["question"].to_pylist(), table["reason"].to_pylist(), strict=True):
            if self.enough:
                return
            self.samples += 1
            if reason or not self._seen.is_new(question):
                self.dropped[reason or NEAR_DUPLICATE] += 1
            else:
                self.prompts.append(question)


def write_prompts(
    config: RunConfig,
    parts: PartFiles,
    *,
    count: int,
    max_new_tokens: int,
    min_tokens: int,
    temperature: float,
    top_p: float,
    note: Callable[[str], None],
) -> Written:
    """Write the file of at most `count` prompts: fewer where 8 * count samples do not hold as many.

    Args:
        config: model.path, teacher (the engine), seed and ray are used.
        min_tokens: shorter turns are dropped.

    Raises:
        ConfigError: the model has no chat template, or the file cannot be made as configured.
        StuckError, WorkerError: a process did not answer in time, or failed.
    """
    check_engine(config)
    path = config.model.path
    check_model_folder("MODEL", path)
    with model_errors("MODEL", path):
        tokenizer, model_config = load_tokenizer(path), load_config(path)
        if config.teacher.backend == "transformers":
            check_family(model_config)
        ends = end_tokens_of(path, model_config, tokenizer)
    if getattr(model_config, "mask_token_id", None) is not None:
        raise ConfigError(f"MODEL: {path!r} is a student; give the autoregressive model that it was made from")
    turn = user_turn(tokenizer, ends, path)
    check_room(config, len(turn.prefix), max_new_tokens, model_config.max_position_embeddings)
    sampling = Sampling(max_new_tokens, temperature, top_p, list(turn.end_tokens))
    size = min(count, _part_size(config, len(turn.prefix) + max_new_tokens))
    parts.open({**asdict(sampling), "min_tokens": min_tokens, "part": size, "model": path, "seed": config.seed})

    written = Written(count)
    following = 0  # the part that is looked at next
    last = -(-_MOST_SAMPLES * count // size)

    def look() -> None:
        nonlocal following
        while not written.enough and parts.has(following):
            written.take(parts.read(following))
            following += 1

    def missing() -> Iterator[tuple[int, list[ResponseRequest]]]:
        for index in range(last):
            if written.enough:
                return
            if not parts.has(index):
                yield index, [ResponseRequest(index * size + i, 0, turn.prefix) for i in range(size)]

    look()
    chunks = missing()
    if (first := next(chunks, None)) is not None:
        connect(config.ray)
        try:
            known = token_count(tokenizer)
            for index, turns in generated(config, chain([first], chunks), config.teacher.actors, sampling, known):
                parts.write(index, _table(tokenizer, turn, turns, min_tokens))
                look()
                note(f"{len(written.prompts):,} of {count:,} prompts from {written.samples:,} samples")
        finally:
            ray.shutdown()
    if not written.prompts:
        reasons = "; ".join(f"{number} {reason}" for reason, number in written.dropped.items())
        raise ConfigError(
            f"MODEL: {path!r} wrote no usable user turn in {written.samples} samples ({reasons}); raise "
            "--max-new-tokens, or give an instruct model"
        )
    parts.finish(pa.table({"question": written.prompts}))
    return written


def user_turn(tokenizer: Any, end_tokens: tuple[int, ...], path: str) -> UserTurn:
    """Found by rendering a user turn with known words.

    Raises:
        ConfigError: there is no chat template, or it does not write the user's words once and as they are.
    """
    chat = ChatTemplate(tokenizer)
    if chat.raw:
        raise ConfigError(
            f"MODEL: {path!r} has no chat template (a base model), so there is no user turn that it could write; give "
            "an instruct model, or the prompts of a data set as data.prompts"
        )
    try:
        text = chat.text(Conversation((Turn("user", _WORDS),), "question"))
    except TEMPLATE_ERRORS as error:
        raise ConfigError(
            f"MODEL: the chat template of {path!r} refuses a user turn ({error}); give another model"
        ) from error
    before, *behind = text.split(_WORDS)
    if len(behind) != 1:
        raise ConfigError(
            f"MODEL: the chat template of {path!r} writes the user's words {len(behind)} times, so where they begin is "
            "not known; give another model"
        )
    # with a space at the end, words would begin with another token than they do in a prompt
    prefix = chat.ids([before.rstrip(" ")])[0]
    if not len(prefix):
        raise ConfigError(
            f"MODEL: the chat template of {path!r} writes nothing before the user's words, so the model would not "
            "know that it is asked for a user turn; give another model"
        )
    special = frozenset(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    after = behind[0].strip()
    first = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
    if first and first[0] in special.union(end_tokens):
        return UserTurn(prefix, tuple(dict.fromkeys((*first, *end_tokens))), "", special)
    return UserTurn(prefix, end_tokens, after.split("\n")[0], special)


def question_of(tokenizer: Any, turn: UserTurn, ids: np.ndarray, min_tokens: int) -> tuple[str, str]:
    """The text of a turn, int32 ids as they were generated, and why it cannot be used; empty: it can."""
    words = without_end(ids, turn.end_tokens)
    text = str(tokenizer.decode(words, skip_special_tokens=False))
    ended = finish_reason(ids, turn.end_tokens) == "eos"
    if turn.marker and turn.marker in text:
        text, ended = text.partition(turn.marker)[0], True
    text = text.strip()
    # what was written with other tokens may be read as a special one
    again = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ended:
        return text, "cut at the limit"
    if not text:
        return text, "empty"
    if len(again) < min_tokens:
        return text, f"shorter than {min_tokens} tokens"
    if "\N{REPLACEMENT CHARACTER}" in text:
        return text, "not valid UTF-8"
    if turn.special.intersection(words.tolist()) or turn.special.intersection(again):
        return text, "holds special tokens"
    return text, ""


def _table(tokenizer: Any, turn: UserTurn, turns: list[np.ndarray], min_tokens: int) -> pa.Table:
    found = [question_of(tokenizer, turn, ids, min_tokens) for ids in turns]
    return pa.table({"question": [text for text, _ in found], "reason": [reason for _, reason in found]})


def _part_size(config: RunConfig, tokens: int) -> int:
    """Turns of one call: enough for the engine's batches, on a CPU those that our sampler runs together."""
    teacher = config.teacher
    if teacher.backend == "vllm" or teacher.resources.gpus:
        return _BATCHED_PART
    return max(1, teacher.max_batched_tokens // tokens)
