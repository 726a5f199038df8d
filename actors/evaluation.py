"""Exact match and decoding speed on problems with a checkable answer."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from actors.drawing import Decoding
from actors.sampler import Sampler
from actors.slots import Request
from common.config import Unmasking
from common.prompts import Prompt, prompt_ids
from common.student import load_model, load_tokenizer
from common.trajectory import Trajectory
from common.word_problems import is_correct


@dataclass
class EvaluationSums:
    """Counts over problems; shards add up.

    Tokens per step = response tokens / denoising forwards, each counted per sequence.
    """

    problems: int = 0
    correct: int = 0
    response_tokens: int = 0
    denoise_forwards: int = 0
    commit_forwards: int = 0
    ended: int = 0
    seconds: float = 0.0

    def __add__(self, other: EvaluationSums) -> EvaluationSums:
        return EvaluationSums(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def figures(self) -> dict[str, float]:
        """Ratios for tables and `summary.json`.

        `forwards_per_token` counts denoising forwards, `forwards_per_token_with_commits` also one commit a block.
        """
        tokens = max(self.response_tokens, 1)
        return {
            "exact_match": self.correct / max(self.problems, 1),
            "tokens_per_step": self.response_tokens / max(self.denoise_forwards, 1),
            "forwards_per_token": self.denoise_forwards / tokens,
            "forwards_per_token_with_commits": (self.denoise_forwards + self.commit_forwards) / tokens,
            "tokens_per_second": self.response_tokens / max(self.seconds, 1e-9),
            "response_tokens_mean": self.response_tokens / max(self.problems, 1),
            "share_ended": self.ended / max(self.problems, 1),
            **{name: value for name, value in asdict(self).items() if name in ("problems", "seconds")},
        }


def evaluate_shard(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Prompt],
    decoding: Decoding,
    max_new_tokens: int,
) -> EvaluationSums:
    """Decode the problems with the sampler's current weights and count."""
    start = time.perf_counter()
    answers = {p.ordinal: p.answer for p in problems}
    requests = [Request(p.ordinal, 0, p.ids, max_new_tokens, p.domain) for p in problems]
    sums = EvaluationSums(problems=len(problems))
    for trajectory in sampler.generate(requests, decoding):
        text = tokenizer.decode(trajectory.response_ids, skip_special_tokens=True)
        sums.correct += is_correct(text, answers[trajectory.ordinal] or "")
        sums.response_tokens += len(trajectory.response_ids)
        sums.denoise_forwards += trajectory.denoise_forwards
        sums.commit_forwards += trajectory.commit_forwards
        sums.ended += trajectory.finish_reason == "eos"
    sums.seconds = time.perf_counter() - start
    return sums


@torch.inference_mode()
def evaluate_teacher_shard(
    path: str, problems: list[Prompt], max_new_tokens: int, device: str, batch_size: int = 64
) -> EvaluationSums:
    """Greedy autoregressive decoding, left-padded batches; one forward makes one token."""
    start = time.perf_counter()
    tokenizer = load_tokenizer(path)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    sums = EvaluationSums(problems=len(problems))
    for first in range(0, len(problems), batch_size):
        chunk = problems[first : first + batch_size]
        width = max(len(p.ids) for p in chunk)
        ids = torch.full((len(chunk), width), tokenizer.eos_token_id)
        attention = torch.zeros_like(ids)
        for row, problem in enumerate(chunk):
            ids[row, width - len(problem.ids) :] = torch.as_tensor(problem.ids.astype("int64"))
            attention[row, width - len(problem.ids) :] = 1
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=attention.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_k=None,
            top_p=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        for problem, row in zip(chunk, out[:, width:].tolist(), strict=True):
            ended = tokenizer.eos_token_id in row
            length = row.index(tokenizer.eos_token_id) + 1 if ended else len(row)
            sums.correct += is_correct(tokenizer.decode(row[:length], skip_special_tokens=True), problem.answer or "")
            sums.response_tokens += length
            sums.denoise_forwards += length
            sums.ended += ended
    sums.seconds = time.perf_counter() - start
    return sums


def load_sampler(
    path: str, *, block_size: int | None, slots: int, dtype: str, device: str | None, seed: int = 0
) -> tuple[Sampler, PreTrainedTokenizerBase]:
    """A sampler on a converted student's folder.

    Raises:
        ValueError: the folder's config has no mask_token_id, so it was never converted.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(path, getattr(torch, dtype), "sdpa").to(device)
    tokenizer = load_tokenizer(path)
    mask_token_id = getattr(model.config, "mask_token_id", None)
    if mask_token_id is None:
        raise ValueError(f"{path!r} has no mask_token_id in its config; convert it first: opdlm convert {path} OUT")
    sampler = Sampler(
        model,
        block_size=block_size or model.config.block_size,
        mask_token_id=mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        slots=slots,
        seed=seed,
    )
    return sampler, tokenizer


def evaluate_student(
    path: str,
    problems: list[Prompt],
    unmasking: Unmasking,
    *,
    block_size: int | None = None,
    max_new_tokens: int,
    slots: int = 64,
    dtype: str = "float32",
    device: str | None = None,
) -> dict[str, float]:
    """Figures of a converted student under greedy decoding; see EvaluationSums.figures."""
    sampler, tokenizer = load_sampler(path, block_size=block_size, slots=slots, dtype=dtype, device=device)
    return evaluate_shard(sampler, tokenizer, problems, Decoding(unmasking, 0.0), max_new_tokens).figures()


def evaluate_teacher(path: str, problems: list[Prompt], *, max_new_tokens: int) -> dict[str, float]:
    """Figures of an autoregressive model under greedy decoding."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return evaluate_teacher_shard(path, problems, max_new_tokens, device).figures()


def generate_texts(
    path: str,
    prompts: list[str],
    unmasking: Unmasking,
    *,
    block_size: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = True,
    dtype: str = "float32",
    device: str | None = None,
) -> list[tuple[str, Trajectory]]:
    """Response text and trajectory of each prompt, in order; `chat` applies the chat template."""
    sampler, tokenizer = load_sampler(
        path, block_size=block_size, slots=min(len(prompts), 64), dtype=dtype, device=device, seed=seed
    )
    requests = [Request(i, 0, _prompt_ids(tokenizer, prompt, chat), max_new_tokens) for i, prompt in enumerate(prompts)]
    done: dict[int, Any] = {t.ordinal: t for t in sampler.generate(requests, Decoding(unmasking, temperature))}
    return [(tokenizer.decode(done[i].response_ids, skip_special_tokens=True), done[i]) for i in range(len(prompts))]


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> np.ndarray:
    if chat:
        return prompt_ids(tokenizer, prompt)
    return np.asarray(tokenizer(prompt, add_special_tokens=False)["input_ids"], dtype=np.int32)
