"""Slow, obvious references: what the fast paths must equal."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.seeds import stream_key, uniform


def block_causal_logits(model: PreTrainedModel, ids: list[int], block_size: int) -> Tensor:
    """float32 (of a float64 model float64) [N, V]: one cacheless forward over the whole sequence, mask written position
    by position."""
    n = len(ids)
    mask = torch.zeros(1, 1, n, n, dtype=torch.bool)
    for q in range(n):
        for k in range(n):
            mask[0, 0, q, k] = k // block_size <= q // block_size
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), attention_mask=mask, position_ids=torch.arange(n)[None])
    return out.logits[0].to(torch.promote_types(out.logits.dtype, torch.float32))


def reference_rollout(
    model: PreTrainedModel,
    prompt: list[int],
    *,
    max_new_tokens: int,
    block_size: int,
    mask_token_id: int,
    eos_token_id: int,
    rule: str,
    threshold: float = 0.9,
    per_step: int = 1,
    bound: float = 0.1,
    lower: float = 0.6,
    revise: float = 0.0,
    temperature: float = 0.0,
    key: tuple[int, int, int] = (0, 0, 0),
) -> tuple[list[int], list[int], int]:
    """One sequence, no cache, no batch, Python loops; returns (written ids, reveal rounds, forwards)."""
    ids = list(prompt)
    rounds: list[int] = []
    forwards = 0
    total = -(-(len(prompt) + max_new_tokens) // block_size) * block_size
    while len(ids) < total:
        start = len(ids) // block_size * block_size
        known = len(ids) - start
        block: list[int | None] = list(ids[start:]) + [None] * (block_size - known)
        revealed = [-1] * block_size
        seen: list[float] = []  # confidences of what was revealed in this block
        step = 0
        while any(t is None for t in block):
            state = ids[:start] + [mask_token_id if t is None else t for t in block]
            logits = block_causal_logits(model, state, block_size)[start:]
            forwards += 1
            log_p = torch.log_softmax(logits, dim=-1)
            candidates: dict[int, tuple[int, float, float]] = {}
            for j in range(known, block_size):
                if block[j] is not None and not revise:
                    continue
                allowed = logits[j].clone()
                allowed[mask_token_id] = -torch.inf
                if temperature == 0:
                    choice = int(allowed.argmax())
                else:
                    u = uniform(
                        torch.tensor([stream_key(*key)]), torch.tensor([start + j]), torch.tensor([step])
                    ).item()
                    cdf = torch.softmax(allowed / temperature, dim=-1).double().cumsum(0)
                    choice = int((cdf < u * cdf[-1]).sum())
                entropy = -(log_p[j].exp() * log_p[j]).sum().item()
                candidates[j] = (choice, log_p[j, choice].exp().item(), entropy)
            again = {j: c for j, c in candidates.items() if block[j] is not None and c[0] != block[j] and c[1] > revise}
            candidates = {j: c for j, c in candidates.items() if block[j] is None}
            for j, (token, _, _) in again.items():
                block[j], revealed[j] = token, step
            for j in chosen_positions(candidates, rule, threshold, per_step, bound, seen, lower):
                block[j] = candidates[j][0]
                seen.append(candidates[j][1])
                revealed[j] = step
            step += 1
        ids = ids[:start] + [t for t in block if t is not None]
        rounds += revealed[known:]
        if eos_token_id in ids[max(start, len(prompt)) :]:
            break
    return ids[len(prompt) :], rounds, forwards


def chosen_positions(
    candidates: dict[int, tuple[int, float, float]],
    rule: str,
    threshold: float,
    per_step: int,
    bound: float,
    seen: list[float],
    lower: float,
) -> list[int]:
    by_confidence = sorted(candidates, key=lambda j: (-candidates[j][1], j))
    if rule == "adaptive":
        level = sum(seen) / len(seen) if seen else candidates[by_confidence[0]][1]
        level = max(lower, min(threshold, level))
        return sorted({by_confidence[0]} | {j for j in candidates if candidates[j][1] >= level})
    if rule == "static":
        return by_confidence[:per_step]
    if rule == "dynamic":
        return sorted(set(by_confidence[:per_step]) | {j for j in candidates if candidates[j][1] > threshold})
    if rule == "sequential":
        return sorted(candidates)[:per_step]
    chosen, total = [], 0.0
    for j in sorted(candidates, key=lambda j: (candidates[j][2], j)):
        total += candidates[j][2]
        if total > bound and chosen:
            break
        chosen.append(j)
        if total > bound:
            break
    return chosen


def masked_state(x0: np.ndarray, masked: np.ndarray, mask_token_id: int) -> np.ndarray:
    """x_t: x0 with the masked positions replaced."""
    return np.where(masked, mask_token_id, x0)
