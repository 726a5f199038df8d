"""The autoregressive model that a student is compared with, on the same problems."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from actors.evaluation.evaluation import Evaluation
from actors.evaluation.responses import Response, said
from actors.sampler.request import Request
from actors.sampler.stop_strings import StopStrings, reach
from common.answers import is_correct
from common.config.evaluation import AnswerFormat
from common.end_tokens import set_end_tokens
from common.prompts import Prompt
from common.seeds import stream_key
from common.student import load_tokenizer, pretrained
from common.trajectory import finish_reason, until_end, without_end
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


def autoregressive_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> Iterator[Response]:
    """Responses of transformers' `generate` on left-padded batches, in the order of the requests; temperature 0 is
    greedy.

    A token counts as one forward. A batch is seeded by its first request, so other batches give other samples.
    """
    for first in range(0, len(requests), batch_size):
        batch = requests[first : first + batch_size]
        torch.manual_seed(stream_key(seed, batch[0].ordinal, batch[0].sample) & 0x7FFFFFFF)
        yield from _answer(model, tokenizer, batch, temperature)


@torch.inference_mode()
def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Request], temperature: float
) -> list[Response]:
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    ends = model.generation_config.eos_token_id
    # the LM head may have more rows than there are tokens: a random or barely trained model would write them
    rows = range(token_count(tokenizer), len(model.get_output_embeddings().weight))
    width = max(len(r.prompt_ids) for r in batch)
    ids = torch.full((len(batch), width), ends[0])
    attention = torch.zeros_like(ids)
    for row, request in enumerate(batch):
        ids[row, width - len(request.prompt_ids) :] = torch.as_tensor(request.prompt_ids.astype("int64"))
        attention[row, width - len(request.prompt_ids) :] = 1
    stops = StopStrings(tokenizer)
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=attention.to(model.device),
        max_new_tokens=max(r.max_new_tokens for r in batch),
        suppress_tokens=list(rows) or None,
        stopping_criteria=[_Stopping(stops, batch, width)] if any(r.stop for r in batch) else None,
        **(sampling if temperature else greedy),
    )
    responses = []
    for request, row in zip(batch, out[:, width:].cpu().numpy().astype(np.int32), strict=True):
        written = until_end(row[: request.max_new_tokens], ends)
        reason = finish_reason(written, ends)
        if request.stop and (count := stops.completed(without_end(written, ends), request.stop)):
            written, reason = written[:count], "stop"
        text = said(tokenizer, written, ends, request.stop)
        responses.append(Response(request.ordinal, request.sample, written, text, len(written), 0, reason))
    return responses


class _Stopping(StoppingCriteria):
    """Ends the rows of a batch at their stop strings."""

    def __init__(self, stops: StopStrings, batch: Sequence[Request], width: int) -> None:
        self.stops = stops
        self.wanted = [request.stop for request in batch]
        self.width = width
        self.reach = max(reach(stop, 1) for stop in self.wanted if stop)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        last = input_ids[:, max(self.width, input_ids.shape[1] - self.reach) :].cpu().numpy()
        ended = [bool(stop) and self.stops.found(ids, stop) for ids, stop in zip(last, self.wanted, strict=True)]
        return torch.tensor(ended, device=input_ids.device)


def evaluate_autoregressive(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Prompt],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    answer_format: AnswerFormat = "answer_line",
) -> Evaluation:
    """Decode the problems, and count."""
    start = time.perf_counter()
    answers = {p.ordinal: p.answer or "" for p in problems}
    requests = [Request(p.ordinal, 0, p.ids, max_new_tokens) for p in problems]
    evaluation = Evaluation()
    for response in autoregressive_responses(
        model, tokenizer, requests, temperature=temperature, seed=seed, batch_size=batch_size
    ):
        evaluation.add(response, is_correct(response.text, answers[response.ordinal], answer_format))
    evaluation.seconds = time.perf_counter() - start
    return evaluation
