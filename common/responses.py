"""Offline responses: trajectories that the student did not make, from a file of questions and responses.

They replace all rollouts (objective.source `offline`) or a share of them (`mixture`), and are then treated like
rollouts: states, teacher, Arrow, learner. A response has no realised rounds, so its states are random masks.
Rollouts of an earlier run (`replay`) have them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.annealing import annealed
from common.config.data import DataConfig
from common.config.objective import ObjectiveConfig
from common.config.sources import ContinuedSource, MixtureSource, Source
from common.conversations import LeftOut, check_text, conversation_of
from common.datasets.errors import PromptError
from common.datasets.folder import ALL_SPLITS
from common.datasets.rows import open_rows
from common.grid import grid_ceil
from common.prompts import Prompt
from common.seeds import source_rng
from common.trajectory import (
    NO_ROUND,
    OFFLINE,
    REPLAYED,
    EndTokens,
    Trajectory,
    finish_reason,
    from_batch,
    read_spool,
    until_end,
)
from common.trajectory_checks import check_batch
from common.vocabulary import tokenizer_fingerprint


def load_responses(
    data: DataConfig, tokenizer: Any, prompts: list[Prompt], end_tokens: Sequence[int]
) -> dict[str, list[np.ndarray]]:
    """The ids of the responses in `data.responses`, int32, by question; responses to other questions are ignored.

    A record has the question and the response as text. The end token is appended unless the record's `finish_reason`
    is `length`. A record that `opdlm respond` wrote also has the generated ids; they are used in place of the text if
    the record's `tokenizer_fingerprint` is that of this tokenizer. Every response ends at its first end token.

    Raises:
        PromptError: see open_rows; a response is missing, empty or contains the mask token; or a prompt has none.
    """
    assert data.responses is not None
    wanted = {p.question for p in prompts}
    fingerprint = tokenizer_fingerprint(tokenizer)
    by_question: dict[str, list[np.ndarray]] = {}
    for place, record in open_rows(data.responses, ALL_SPLITS):
        try:
            question = conversation_of(place, record, data).question
        except LeftOut:  # no prompt, so nobody's response
            continue
        if question not in wanted:
            continue
        ids = _ids(place, record, data.response_field, tokenizer, fingerprint, end_tokens)
        by_question.setdefault(question, []).append(ids)
    without = [p.question for p in prompts if p.question not in by_question]
    if without:
        raise PromptError(
            f"{data.responses!r}: {len(set(without))} of {len(wanted)} questions of {data.prompts!r} have no response, "
            f"the first is {without[0]!r}; make them with opdlm respond, or set data.question_field to the field "
            "that holds the question in both files"
        )
    return by_question


def _ids(
    place: str, record: dict[str, Any], field: str, tokenizer: Any, fingerprint: str, end_tokens: Sequence[int]
) -> np.ndarray:
    if record.get("response_ids") is not None and record.get("tokenizer_fingerprint") == fingerprint:
        ids = np.asarray(record["response_ids"], dtype=np.int32)
    else:
        text = record.get(field)
        if not isinstance(text, str):
            raise PromptError(
                f"{place}: no text in field {field!r}; the record has {sorted(record)}. "
                "Set data.response_field to the field that holds the response"
            )
        check_text(place, text)
        ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
        if record.get("finish_reason") != "length":
            ids = np.append(ids, np.int32(end_tokens[0]))
    ids = until_end(ids, end_tokens)
    if not len(ids) or tokenizer.mask_token_id in ids:
        wrong = f"holds the mask token {tokenizer.mask_token!r}" if len(ids) else "is empty"
        raise PromptError(f"{place}: the response {wrong}; correct or remove it")
    return ids


# what a rollout gives: fields that have no default
_ROLLED = [f.name for f in fields(Trajectory) if f.default is MISSING and f.default_factory is MISSING]
Known = Mapping[str, Sequence[np.ndarray | Trajectory]]  # what stands in for rollouts, by question


def load_trajectories(
    path: str, prompts: list[Prompt], vocabulary: int, **expected: Any
) -> dict[str, list[Trajectory]]:
    """The rollouts in what pipeline.spool wrote, by question; those to other prompts, and offline responses, are
    ignored. States and targets are not kept: they are selected and asked for anew.

    Args:
        path: a folder of `.arrow` files, or one file.
        vocabulary: rows of the student's embedding.
        expected: the fields of TrajectoryMeta that must have these values, such as block_size.

    Raises:
        PromptError: there is no file; one does not hold trajectories of such a run; or a prompt has none.
    """
    place = Path(path)
    files = sorted(place.glob("*.arrow")) if place.is_dir() else [place]
    if not files or not files[0].is_file():
        raise PromptError(
            f"{path!r} has no .arrow file; give a folder that pipeline.spool wrote, such as runs/NAME/spool"
        )
    question = {p.ids.tobytes(): p.question for p in prompts}
    found: dict[str, list[Trajectory]] = {}
    for file in files:
        try:
            for batch in read_spool(file):
                check_batch(batch, vocabulary).require(**expected)
                for t in from_batch(batch)[0]:
                    if t.weights_version >= 0 and (asked := question.get(t.prompt_ids.tobytes())) is not None:
                        found.setdefault(asked, []).append(Trajectory(**{name: getattr(t, name) for name in _ROLLED}))
        except ValueError as error:
            raise PromptError(f"{str(file)!r}: {error}") from error
    if without := [p.question for p in prompts if p.question not in found]:
        raise PromptError(
            f"{path!r}: {len(set(without))} of {len(set(question.values()))} prompts have no rollout there, the first "
            f"is {without[0]!r}; take the prompts of the run that wrote it, or fewer of them with data.limit"
        )
    return found


def offline_share(source: Source, batch: int) -> float:
    """Probability that a prompt of rollout batch `batch` (from 0) takes its offline response."""
    if not isinstance(source, MixtureSource):
        return float(source.kind not in ("student", "continued"))
    return annealed(source.schedule, source.start, source.end, source.batches, batch)


def with_responses(prompts: list[Prompt], share: float, offline: Known, samples: int, seed: int) -> list[Prompt]:
    """The prompts; those that take offline responses have `responses` set.

    Which prompts do, and which responses they take, is seeded by the ordinal alone. The samples of a prompt take
    different responses as long as there are enough.
    """

    def choose(prompt: Prompt) -> Prompt:
        rng = source_rng(seed, prompt.ordinal)
        if rng.random() >= share:
            return prompt
        known = offline[prompt.question]
        first = int(rng.integers(len(known)))
        return replace(prompt, responses=tuple(known[(first + s) % len(known)] for s in range(samples)))

    return [choose(p) for p in prompts]


def with_prefixes(
    prompts: list[Prompt], most: float, offline: Known, longest: Callable[[Prompt], int], seed: int
) -> list[Prompt]:
    """The prompts, each followed by the beginning of one of its offline responses (source `continued`): a uniform share
    of it, up to `most`, and of the `longest` response that the prompt may have. At least one token is left to write.

    Which response and how much of it is seeded by the ordinal alone; all samples of a prompt go on with the same.
    """

    def begun(prompt: Prompt) -> Prompt:
        rng = source_rng(seed, prompt.ordinal)
        known = offline[prompt.question]
        response = known[int(rng.integers(len(known)))]
        assert isinstance(response, np.ndarray)
        length = int(rng.random() * most * min(len(response), longest(prompt)))
        return replace(prompt, ids=np.concatenate([prompt.ids, response[:length]]), begun=length)

    return [begun(prompt) for prompt in prompts]


def for_extra_losses(
    prompts: list[Prompt],
    objective: ObjectiveConfig,
    weights: Sequence[float],
    offline: Known,
    samples: int,
    seed: int,
    longest: Callable[[Prompt], int],
    replayed: Known | None = None,
) -> list[Prompt]:
    """The same prompts again for every extra loss whose weight is not 0, with the samples that are its own; `longest`
    as in with_prefixes."""
    more = []
    for i, (extra, weight) in enumerate(zip(objective.extra, weights, strict=True), start=1):
        if weight:
            own = [replace(prompt, first_sample=i * samples) for prompt in prompts]
            if isinstance(extra.source, ContinuedSource):
                own = with_prefixes(own, extra.source.max_share, offline, longest, seed)
            known = replayed or {} if extra.source.kind == "replay" else offline
            more += with_responses(own, offline_share(extra.source, 0), known, samples, seed)
    return more


def offline_trajectory(
    prompt: Prompt, sample: int, max_new_tokens: int, block_size: int, mask_token_id: int, eos_token_id: EndTokens
) -> Trajectory:
    """The offline response to the `sample`-th of a prompt's samples as a trajectory: at most `max_new_tokens` of it,
    its last block filled with mask tokens.

    The mask tokens are what decoding sees there before it reveals more. Like a rollout's tail they are context and
    never trained. A rollout of an earlier run keeps what it wrote there, and its rounds.
    """
    stored = prompt.responses[sample]
    if isinstance(stored, Trajectory):
        return _replayed(prompt, sample, stored, max_new_tokens, block_size, eos_token_id)
    response = stored[:max_new_tokens]
    length = len(prompt.ids) + len(response)
    tail = grid_ceil(length, block_size) - length
    return Trajectory(
        ordinal=prompt.ordinal,
        sample=prompt.first_sample + sample,
        domain=prompt.domain,
        prompt_ids=prompt.ids,
        response_ids=response,
        tail_ids=np.full(tail, mask_token_id, np.int32),
        reveal_round=np.full(len(response) + tail, NO_ROUND, np.int16),
        confidence=np.zeros(len(response) + tail, np.float32),
        weights_version=OFFLINE,
        finish_reason=finish_reason(response, eos_token_id),
        denoise_forwards=0,
        commit_forwards=0,
    )


def _replayed(
    prompt: Prompt, sample: int, stored: Trajectory, max_new_tokens: int, block_size: int, eos_token_id: EndTokens
) -> Trajectory:
    """A rollout of an earlier run, up to the end of the block in which its response ends or is cut."""
    length = min(len(stored.response_ids), max_new_tokens)
    end = grid_ceil(len(prompt.ids) + length, block_size) - len(prompt.ids)
    written = np.concatenate([stored.response_ids, stored.tail_ids])[:end]
    whole = length == len(stored.response_ids)
    return Trajectory(
        ordinal=prompt.ordinal,
        sample=prompt.first_sample + sample,
        domain=prompt.domain,
        prompt_ids=prompt.ids,
        response_ids=written[:length],
        tail_ids=written[length:],
        reveal_round=stored.reveal_round[:end],
        confidence=stored.confidence[:end],
        weights_version=REPLAYED,
        finish_reason=stored.finish_reason if whole else finish_reason(written[:length], eos_token_id),
        denoise_forwards=0,
        commit_forwards=0,
    )
