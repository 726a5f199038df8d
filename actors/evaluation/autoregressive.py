"""The autoregressive model that a student is compared with, on the same problems."""

from __future__ import annotations

import time

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from actors.evaluation.evaluation import Evaluation
from common.answers import is_correct
from common.config.run import AnswerFormat
from common.end_tokens import response_text, set_end_tokens
from common.prompts import Prompt
from common.student import load_tokenizer
from common.trajectory import finish_reason, until_end


def load_autoregressive(
    path: str, device: str, dtype: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM with its own mask, its end tokens in its generation config; default dtype: float32 on CPU, else
    bfloat16."""
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), trust_remote_code=False)
    tokenizer = load_tokenizer(path)
    set_end_tokens(model, tokenizer)
    return model.to(device).eval(), tokenizer


@torch.inference_mode()
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
    """Decode left-padded batches with transformers' `generate`; a token takes one forward, temperature 0 is greedy."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    ends = model.generation_config.eos_token_id
    evaluation = Evaluation()
    for first in range(0, len(problems), batch_size):
        chunk = problems[first : first + batch_size]
        width = max(len(p.ids) for p in chunk)
        ids = torch.full((len(chunk), width), ends[0])
        attention = torch.zeros_like(ids)
        for row, problem in enumerate(chunk):
            ids[row, width - len(problem.ids) :] = torch.as_tensor(problem.ids.astype("int64"))
            attention[row, width - len(problem.ids) :] = 1
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=attention.to(model.device),
            max_new_tokens=max_new_tokens,
            **(sampling if temperature else greedy),
        )
        for problem, row in zip(chunk, out[:, width:].cpu().numpy(), strict=True):
            response = until_end(row, ends)
            text = response_text(tokenizer, response, ends)
            evaluation.add(
                correct=is_correct(text, problem.answer or "", answer_format),
                tokens=len(response),
                denoise=len(response),
                commits=0,
                ended=finish_reason(response, ends) == "eos",
            )
    evaluation.seconds = time.perf_counter() - start
    return evaluation
