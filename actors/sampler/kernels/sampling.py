"""Triton kernels of sampling by inverse CDF or argmax; actors/sampler/sampling.py has the reference.

Logits are [P, V], P positions. The vocabulary is read once, in chunks. Their maxima and sums tell which chunk holds the
sampled token, and only that chunk is read again. Truncation would need the logits in order and is left to the
reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096


def sample_tokens_triton(
    logits: Tensor, noise: Tensor, temperature: float, mask_token_id: int, token_count: int | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens int64 [...] and confidences float32 [...] of `actors.sampler.sampling.sample_tokens` without truncation.

    Args:
        logits: float32 [..., V], contiguous; noise: float32 [...] in (0, 1), unused at temperature 0.
    """
    shape, vocabulary = logits.shape[:-1], logits.shape[-1]
    flat = logits.view(-1, vocabulary)
    positions, chunks = len(flat), triton.cdiv(vocabulary, CHUNK)
    statistics = torch.empty(5, positions, chunks, dtype=torch.float32, device=logits.device)
    inverse = 1.0 / temperature if temperature else 1.0
    known = vocabulary if token_count is None else token_count
    _chunk_statistics[(positions, chunks)](flat, statistics, vocabulary, known, mask_token_id, inverse, CHUNK=CHUNK)
    tokens = torch.empty(positions, dtype=torch.int64, device=logits.device)
    confidence = torch.empty(positions, dtype=torch.float32, device=logits.device)
    _choose[(positions,)](
        flat, statistics, noise.contiguous(), tokens, confidence, vocabulary, known, mask_token_id, inverse, chunks,
        CHUNK=CHUNK, CHUNKS=triton.next_power_of_2(chunks), GREEDY=temperature == 0,
    )  # fmt: skip
    return tokens.view(shape), confidence.view(shape)


@triton.jit
def _chunk_statistics(logits, statistics, vocabulary, known, mask_token_id, inverse, CHUNK: tl.constexpr):
    p = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    v = c * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + p * vocabulary + v, mask=v < vocabulary, other=float("-inf"))
    y = tl.where((v == mask_token_id) | (v >= known), float("-inf"), x)
    raw_highest = tl.max(x, 0)
    highest = tl.max(y, 0)
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    plane = tl.num_programs(0) * tl.num_programs(1)
    at = statistics + p * tl.num_programs(1) + c
    tl.store(at, raw_highest)
    tl.store(at + plane, tl.sum(tl.exp(x - raw_highest), 0))
    tl.store(at + 2 * plane, highest)
    tl.store(at + 3 * plane, tl.sum(tl.exp((y - reference) * inverse), 0))
    tl.store(at + 4 * plane, tl.argmax(y, 0).to(tl.float32))


@triton.jit
def _choose(
    logits, statistics, noise, tokens, confidence, vocabulary, known, mask_token_id, inverse, chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    plane = tl.num_programs(0) * chunks
    c = tl.arange(0, CHUNKS)
    there = c < chunks
    at = statistics + p * chunks + c
    raw_highest = tl.load(at, mask=there, other=float("-inf"))
    raw_sum = tl.load(at + plane, mask=there, other=0.0)
    top = tl.max(raw_highest, 0)
    log_z = top + tl.log(tl.sum(raw_sum * tl.exp(raw_highest - top), 0))
    highest = tl.load(at + 2 * plane, mask=there, other=float("-inf"))
    best = tl.max(highest, 0)
    if GREEDY:
        chunk = tl.argmax(highest, 0)
        token = chunk * CHUNK + tl.load(statistics + 4 * plane + p * chunks + chunk).to(tl.int32)
    else:
        tempered = tl.load(at + 3 * plane, mask=there, other=0.0)
        mass = tl.where(there, tempered * tl.exp((highest - best) * inverse), 0.0)
        cdf = tl.cumsum(mass, 0)
        target = tl.load(noise + p) * tl.sum(mass, 0)
        chunk = tl.minimum(tl.sum((cdf < target).to(tl.int32), 0), chunks - 1)
        rest = target - tl.sum(tl.where(c < chunk, mass, 0.0), 0)
        v = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + p * vocabulary + v, mask=v < vocabulary, other=float("-inf"))
        weight = tl.where((v == mask_token_id) | (v >= known), 0.0, tl.exp((x - best) * inverse))
        inside = tl.sum((tl.cumsum(weight, 0) < rest).to(tl.int32), 0)
        last = tl.max(tl.where(weight > 0, tl.arange(0, CHUNK), 0), 0)  # where rounding runs past the sum
        token = chunk * CHUNK + tl.minimum(inside, last)
    tl.store(tokens + p, token.to(tl.int64))
    tl.store(confidence + p, tl.exp(tl.load(logits + p * vocabulary + token) - log_z))
