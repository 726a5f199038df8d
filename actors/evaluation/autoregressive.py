"""The autoregressive model that a student is compared with, on the same problems."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.evaluation.evaluation import Evaluation
from actors.evaluation.responses import Response, responses
from actors.sampler.autoregressive import AutoregressiveSampler, token_by_token
from actors.sampler.request import Request
from common.answers import is_correct
from common.config.evaluation import AnswerFormat
from common.end_tokens import set_end_tokens
from common.prompts import Prompt
from common.student import load_tokenizer, pretrained
from common.vocabulary import token_count


def load_autoregressive(
    path: str, device: str, dtype: str | None = None, ends: Sequence[int] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM with its own mask, its end tokens (or `ends`) in its generation config; default dtype: float32 on
    CPU, else bfloat16."""
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    model = pretrained(path, dtype=getattr(torch, dtype))
    tokenizer = load_tokenizer(path)
    set_end_tokens(model, tokenizer, ends)
    return model.to(device).eval(), tokenizer


def autoregressive_sampler(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    slots: int,
    seed: int = 0,
    compiled: bool = True,
) -> AutoregressiveSampler:
    """A sampler on what `load_autoregressive` gives, which can be read as before beside it."""
    return AutoregressiveSampler(
        model,
        eos_token_id=model.generation_config.eos_token_id,
        token_count=token_count(tokenizer),
        slots=slots,
        seed=seed,
        tokenizer=tokenizer,
        compiled=compiled,
    )


def autoregressive_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    slots: int = 64,
) -> list[Response]:
    """A response to each request, in their order; temperature 0 is greedy. A token counts as one forward."""
    slots = min(slots, len(requests))
    # a few hundred responses take less time than compiling does; passes are CUDA graphs all the same
    sampler = autoregressive_sampler(model, tokenizer, slots=slots, seed=seed, compiled=False)
    found = {(r.ordinal, r.sample): r for r in responses(sampler, tokenizer, requests, token_by_token(temperature))}
    return [found[r.ordinal, r.sample] for r in requests]


def evaluate_autoregressive(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Prompt],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    slots: int = 64,
    answer_format: AnswerFormat = "answer_line",
) -> Evaluation:
    """Decode the problems, and count."""
    start = time.perf_counter()
    answers = {p.ordinal: p.answer or "" for p in problems}
    requests = [Request(p.ordinal, 0, p.ids, max_new_tokens) for p in problems]
    evaluation = Evaluation()
    for response in autoregressive_responses(
        model, tokenizer, requests, temperature=temperature, seed=seed, slots=slots
    ):
        evaluation.add(response, is_correct(response.text, answers[response.ordinal], answer_format))
    evaluation.seconds = time.perf_counter() - start
    return evaluation
