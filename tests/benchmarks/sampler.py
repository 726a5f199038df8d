"""Rollout throughput: tokens per second of the sampler, against its eager self and against the memory floor."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from actors.drawing import Decoding
from actors.sampler import Sampler
from actors.slots import Request
from common.config import StaticUnmasking
from tests.benchmarks.models import copy_bandwidth, matmul_rate, random_model

BLOCK = 4


def measure(size: str, device: str, sequences: int, prompt: int, new_tokens: int) -> list[dict[str, Any]]:
    """Rows for static decoding (one token a step) and two tokens a step; end tokens are ignored."""
    model = random_model(size, device)
    rows = []
    for tokens_per_step in (1, 2):
        decoding = Decoding(StaticUnmasking(steps_per_block=BLOCK // tokens_per_step), 1.0)
        speeds = {}
        for graphs in (False, True) if device == "cuda" else (False,):  # eager first: compiling stays
            if graphs or device == "cpu" or tokens_per_step == 1:
                speeds[graphs] = _speed(model, decoding, sequences, prompt, new_tokens, graphs)
        fast = speeds[device == "cuda"]
        row = {"size": size, "sequences": sequences, "tokens_per_step": tokens_per_step, **fast}
        if False in speeds and device == "cuda":
            row["eager_tokens_per_second"] = speeds[False]["tokens_per_second"]
            row["ratio"] = fast["tokens_per_second"] / speeds[False]["tokens_per_second"]
        if device == "cuda":
            floor = pass_floor_seconds(model, sequences, prompt + new_tokens // 2)
            # at the floor a block costs its denoising passes and one commit, each at the speed of the memory
            at_floor = sequences * BLOCK / ((BLOCK // tokens_per_step + 1) * floor)
            row["floor_tokens_per_second"] = at_floor
            row["of_floor"] = fast["tokens_per_second"] / at_floor
        rows.append(row)
    return rows


def _speed(
    model: Any, decoding: Decoding, sequences: int, prompt: int, new_tokens: int, graphs: bool
) -> dict[str, float]:
    sampler = _sampler(model, sequences, graphs)
    requests = _requests(sequences, prompt, new_tokens)
    start = time.perf_counter()
    for _ in range(2 if graphs else 0):  # first uses, then captures
        for _ in sampler.generate(requests, decoding):
            pass
    _synchronise(model)
    print(f"  warm-up {time.perf_counter() - start:.1f} s", flush=True)
    before, start = sampler.forwards, time.perf_counter()
    tokens = sum(len(t.response_ids) for t in sampler.generate(requests, decoding))
    _synchronise(model)
    seconds, passes = time.perf_counter() - start, sampler.forwards - before
    return {"tokens_per_second": tokens / seconds, "ms_per_pass": 1e3 * seconds / passes, "passes": passes}


def _sampler(model: Any, sequences: int, fast: bool) -> Sampler:
    return Sampler(
        model, block_size=BLOCK, mask_token_id=model.config.vocab_size - 1, eos_token_id=-1,
        slots=sequences, seed=0, cuda_graphs=fast, compiled=fast,
    )  # fmt: skip


def _requests(sequences: int, prompt: int, new_tokens: int) -> list[Request]:
    rng = np.random.default_rng(0)
    return [Request(i, 0, rng.integers(0, 200, size=prompt + i % BLOCK), new_tokens) for i in range(sequences)]


def profile(size: str, sequences: int, prompt: int, new_tokens: int) -> list[tuple[str, float]]:
    """Milliseconds a pass by CUDA kernel, the greatest first, of static decoding from graphs."""
    model = random_model(size, "cuda")
    sampler = _sampler(model, sequences, True)
    requests, decoding = _requests(sequences, prompt, new_tokens), Decoding(StaticUnmasking(), 1.0)
    for _ in range(2):
        for _ in sampler.generate(requests, decoding):
            pass
    before = sampler.forwards
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in sampler.generate(_requests(sequences, prompt, 64), decoding):
            pass
        torch.cuda.synchronize()
    passes = sampler.forwards - before
    events = [(e.key[:90], e.self_device_time_total / 1e3 / passes) for e in profiler.key_averages()]
    return sorted(events, key=lambda event: -event[1])[:25]


def pass_floor_seconds(model: Any, sequences: int, context: int) -> float:
    """The greater of two times: weights and cache read once at this device's measured copy bandwidth; the pass's
    products at its measured matmul rate."""
    c = model.config
    parameters = sum(p.numel() for p in model.parameters())
    cache = sequences * context * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2
    return max((2 * parameters + cache) / copy_bandwidth(), 2 * parameters * sequences * BLOCK / matmul_rate())


def _synchronise(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
