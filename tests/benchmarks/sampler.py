"""Rollout throughput: tokens per second of the sampler, against its eager self and against the memory floor."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from actors.sampler import Decoding, Sampler
from actors.slots import Request
from common.config import StaticUnmasking
from tests.benchmarks.models import random_model

BLOCK = 4


def measure(size: str, device: str, sequences: int, prompt: int, new_tokens: int) -> list[dict[str, Any]]:
    """Rows for static decoding (one token a step) and two tokens a step; end tokens are ignored."""
    model = random_model(size, device)
    rows = []
    for tokens_per_step in (1, 2):
        decoding = Decoding(StaticUnmasking(steps_per_block=BLOCK // tokens_per_step), 1.0)
        speeds = {}
        for graphs in (True, False) if device == "cuda" else (False,):
            speeds[graphs] = _speed(model, decoding, sequences, prompt, new_tokens, graphs)
        fast = speeds[device == "cuda"]
        row = {"size": size, "sequences": sequences, "tokens_per_step": tokens_per_step, **fast}
        if device == "cuda":
            row["eager_tokens_per_second"] = speeds[False]["tokens_per_second"]
            row["ratio"] = fast["tokens_per_second"] / speeds[False]["tokens_per_second"]
            floor = pass_floor_seconds(model, sequences, prompt + new_tokens // 2)
            row["floor_ms"] = 1e3 * floor
            row["of_floor"] = floor / (fast["ms_per_pass"] / 1e3)
        rows.append(row)
    return rows


def _speed(
    model: Any, decoding: Decoding, sequences: int, prompt: int, new_tokens: int, graphs: bool
) -> dict[str, float]:
    sampler = Sampler(
        model, block_size=BLOCK, mask_token_id=model.config.vocab_size - 1, eos_token_id=-1,
        slots=sequences, seed=0, cuda_graphs=graphs,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    requests = [Request(i, 0, rng.integers(0, 200, size=prompt + i % BLOCK), new_tokens) for i in range(sequences)]
    for _ in range(2):  # eager first uses, then captures
        for _ in sampler.generate(requests, decoding):
            pass
    _synchronise(model)
    before, start = sampler.forwards, time.perf_counter()
    tokens = sum(len(t.response_ids) for t in sampler.generate(requests, decoding))
    _synchronise(model)
    seconds, passes = time.perf_counter() - start, sampler.forwards - before
    return {"tokens_per_second": tokens / seconds, "ms_per_pass": 1e3 * seconds / passes, "passes": passes}


def pass_floor_seconds(model: Any, sequences: int, context: int) -> float:
    """Weights once and the cached keys and values once, at this device's measured copy bandwidth."""
    c = model.config
    weights = sum(p.numel() for p in model.parameters()) * 2
    cache = sequences * context * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2
    return (weights + cache) / copy_bandwidth()


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large device-to-device copy."""
    a = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    for _ in range(3):
        b.copy_(a)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        b.copy_(a)
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * a.nbytes / (start.elapsed_time(end) / 1e3)


def _synchronise(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
