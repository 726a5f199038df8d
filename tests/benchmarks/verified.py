"""Verified decoding against one-token decoding of the same text with the same kernels: speed, forwards, acceptance."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from actors.evaluation.generation import load_student
from actors.sampler.autoregressive import AutoregressiveSampler
from actors.sampler.request import Request
from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding
from actors.sampler.verification import acceptance
from common.adapter_files import read_adapter
from common.config.adapter import AdapterConfig
from common.config.data import DataConfig
from common.config.unmasking import SpeculativeUnmasking
from common.lora import add_adapters
from common.prompts import load_prompts
from common.student import add_rows, load_model
from common.trajectory import Trajectory
from common.vocabulary import token_count
from tests.benchmarks.loop import Wanted
from tests.benchmarks.models import random_model

SEQUENCES = (1, 8, 32, 128)  # decoded together
GREEDY = Decoding(SpeculativeUnmasking(), 0.0)
_RANDOM_BLOCK = 8
_NOTHING = Wanted()


def measure(
    size: str, device: str, most: int, prompt: int, new_tokens: int, wanted: Wanted = _NOTHING
) -> Iterator[dict[str, Any]]:
    """A row for each number of sequences, and on CUDA for each dtype, of at most `most` responses.

    With `wanted.model`, a student's folder, and `wanted.prompts` the numbers are a trained model's; else weights and
    adapter are random, and so is what is accepted. One-token decoding is of the adapter's base model, or of the student
    itself where it has no gated adapter.
    """
    for dtype in ("bfloat16", "float32") if device == "cuda" else ("float32",):
        student, original, requests, options = _models(size, device, dtype, most, prompt, new_tokens, wanted)
        block = student.config.block_size
        facts = {"model": wanted.model or f"random {size}", "dtype": dtype, "block": block, "new_tokens": new_tokens}
        for sequences in SEQUENCES:
            asked = requests[: max(16, 2 * sequences)]
            fast = {"slots": sequences, "cuda_graphs": device == "cuda", "compiled": device == "cuda", **options}
            verified, made = _timed(Sampler(student, block_size=block, **fast), asked)
            alone = {name: value for name, value in fast.items() if name != "mask_token_id"}
            one_token = AutoregressiveSampler(original, never_written=options["mask_token_id"], **alone)
            plain, expected = _timed(one_token, asked)
            tokens = sum(len(t.response_ids) for t in made)
            kept, tested = acceptance(made, block)
            yield facts | {
                "sequences": sequences,
                "responses": len(made),
                "tokens": tokens,
                "tokens_per_second": tokens / verified,
                "causal_tokens_per_second": sum(len(t.response_ids) for t in expected) / plain,
                "speedup": tokens / verified / (sum(len(t.response_ids) for t in expected) / plain),
                "tokens_per_forward": tokens / sum(t.denoise_forwards for t in made),
                "acceptance": [round(float(k / n), 4) if n else None for k, n in zip(kept, tested, strict=True)],
                "differing_responses": _differing(made, expected),
            }


def _models(
    size: str, device: str, dtype: str, most: int, prompt: int, new_tokens: int, wanted: Wanted
) -> tuple[Any, Any, list[Request], dict[str, Any]]:
    """Student, original, the requests, and what samplers must know of the tokens."""
    if wanted.model is None:
        student, original = random_model(size, device), random_model(size, device)
        add_adapters(student, AdapterConfig(rank=16, gate="mask"))
        student.requires_grad_(False)
        student.config.block_size, student.config.mask_token_id = _RANDOM_BLOCK, student.config.vocab_size - 1
        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, 200, size=prompt + i % _RANDOM_BLOCK) for i in range(most)]
        options = {"mask_token_id": student.config.mask_token_id, "eos_token_id": -1, "token_count": None}
    else:
        student, tokenizer = load_student(wanted.model, dtype, device)
        adapter = read_adapter(wanted.model)
        gated = adapter is not None and adapter.config.gated
        source = adapter.base if adapter and gated else wanted.model
        original = load_model(source, getattr(torch, dtype), "sdpa").to(device).requires_grad_(False)
        if student.config.vocab_size > original.config.vocab_size:
            add_rows(original, student.config.vocab_size)
        data = DataConfig(prompts=wanted.prompts or "deploy/data/word_problems_heldout.jsonl", limit=most)
        prompts = [p.ids for p in load_prompts(data, tokenizer, 0).prompts]
        options = {
            "mask_token_id": student.config.mask_token_id,
            "eos_token_id": student.generation_config.eos_token_id,
            "token_count": token_count(tokenizer),
        }
    student.config.attention_context = original.config.attention_context = "causal"
    requests = [Request(i, 0, ids, new_tokens) for i, ids in enumerate(prompts)]
    longest = max(map(len, prompts)) + new_tokens + student.config.block_size
    return student, original, requests, options | {"seed": 0, "longest": longest}


def _timed(sampler: Sampler, requests: list[Request]) -> tuple[float, list[Trajectory]]:
    """Seconds and trajectories; on CUDA after two rounds, which compile and capture."""
    for _ in range(2 if sampler.on_cuda else 0):
        for _ in sampler.generate(requests, GREEDY):
            pass
        torch.cuda.synchronize()
    start = time.perf_counter()
    made = list(sampler.generate(requests, GREEDY))
    if sampler.on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, made


def _differing(made: list[Trajectory], expected: list[Trajectory]) -> int:
    texts = {t.ordinal: t.response_ids.tolist() for t in expected}
    return sum(t.response_ids.tolist() != texts[t.ordinal] for t in made)
