"""Rollout throughput: tokens per second of the sampler, against its eager form and against the memory floor."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from actors.sampler.cache import CacheRows
from actors.sampler.device_pass import DevicePass
from actors.sampler.request import Request
from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding
from common.config.unmasking import StaticUnmasking
from common.grid import grid_ceil
from tests.benchmarks.lengths import uneven_lengths
from tests.benchmarks.models import copy_bandwidth, matmul_rate, random_model
from tests.benchmarks.operators import Operator, hottest

BLOCK = 4


def measure(size: str, device: str, sequences: int, prompt: int, new_tokens: int) -> Iterator[dict[str, Any]]:
    """Rows for static decoding (one token a step) and two tokens a step, then for one token a step and twice as many
    uneven responses as slots; end tokens are ignored."""
    model = random_model(size, device)
    measure_on = _on_cuda if device == "cuda" else _on_cpu
    for n in (1, 2):
        row = {"size": size, "sequences": sequences, "tokens_per_step": n}
        yield row | measure_on(model, n, sequences, prompt, new_tokens)
    yield {"size": size, "sequences": sequences, "tokens_per_step": 1, "lengths": "uneven"} | _uneven(
        model, device == "cuda", sequences, prompt, new_tokens
    )


def _on_cpu(model: Any, tokens_per_step: int, sequences: int, prompt: int, new_tokens: int) -> dict[str, Any]:
    """All sequences together with fused commits; against commits of their own; against one sequence at a time."""
    decoding = Decoding(StaticUnmasking(steps_per_block=BLOCK // tokens_per_step), 1.0)
    requests = _requests(sequences, prompt, new_tokens)
    row: dict[str, Any] = _speed(_sampler(model, sequences, False), requests, decoding)
    separate = _speed(_sampler(model, sequences, False, SeparateCommits), requests, decoding)
    alone = _speed(_sampler(model, 1, False), requests[: max(sequences // 8, 1)], decoding)
    row["over_separate_commits"] = row["tokens_per_second"] / separate["tokens_per_second"]
    row["over_one_sequence_at_a_time"] = row["tokens_per_second"] / alone["tokens_per_second"]
    return row


def _on_cuda(model: Any, tokens_per_step: int, sequences: int, prompt: int, new_tokens: int) -> dict[str, Any]:
    """Compiled layers and graphs; against the eager sampler (static only); against the floor."""
    decoding = Decoding(StaticUnmasking(steps_per_block=BLOCK // tokens_per_step), 1.0)
    requests = _requests(sequences, prompt, new_tokens)
    eager = None
    if tokens_per_step == 1:  # first: layers stay compiled
        eager = _speed(_sampler(model, sequences, False), requests, decoding)
    fast: Any = _sampler(model, sequences, True, TimedPrefill)
    for _ in range(2):  # first uses, then captures
        for _ in fast.generate(requests, decoding):
            pass
    fast.prefill_seconds = 0.0
    row: dict[str, Any] = _speed(fast, requests, decoding)
    row["prefill_share"] = fast.prefill_seconds * row["tokens_per_second"] / row["tokens"]
    if eager:
        row["over_eager"] = row["tokens_per_second"] / eager["tokens_per_second"]
    # at the floor a block costs its denoising passes and one commit, each at the speed of the memory
    floor = pass_floor_seconds(model, sequences, prompt + new_tokens // 2)
    row["floor_tokens_per_second"] = sequences * BLOCK / ((BLOCK // tokens_per_step + 1) * floor)
    row["of_floor"] = row["tokens_per_second"] / row["floor_tokens_per_second"]
    row["of_floor_without_prefill"] = row["of_floor"] / (1 - row["prefill_share"])
    return row


def _uneven(model: Any, fast: bool, sequences: int, prompt: int, new_tokens: int) -> dict[str, float]:
    """Of 2 * sequences responses in as many slots as sequences; `slots_in_use` is their mean share over all passes."""
    decoding = Decoding(StaticUnmasking(), 1.0)
    lengths = uneven_lengths(new_tokens, 2 * sequences)
    requests = [replace(r, max_new_tokens=n) for r, n in zip(_requests(2 * sequences, prompt, 0), lengths, strict=True)]
    sampler = _sampler(model, sequences, fast)
    if fast:
        for _ in range(2):  # first uses, then captures
            for _ in sampler.generate(requests, decoding):
                pass
    row = _speed(sampler, requests, decoding)
    row["slots_in_use"] = row["tokens"] / (row["passes"] * sequences)
    return row


class CommitsFirst(DevicePass):
    def __call__(
        self, state: Any, decodings: tuple[Decoding, ...], slots: torch.Tensor, commits: int, tokens: int
    ) -> torch.Tensor:
        if commits:
            rows = slots[state.uncommitted[slots]]
            positions = (state.block[rows, None] - 1) * state.block_size + torch.arange(state.block_size)
            cache_rows = CacheRows(rows, positions, state.block_size)
            self.model.forward(state.ids[rows[:, None], positions], positions, cache_rows)
            state.uncommitted[rows] = False
        return super().__call__(state, decodings, slots, 0, tokens)


class SeparateCommits(Sampler):
    """What the fused commit replaces: a forward of its own for the blocks that are done."""

    pass_class = CommitsFirst


class TimedPrefill(Sampler):
    """Counts the seconds of prefills, each waited for."""

    prefill_seconds = 0.0

    def _prefill(self, *args: Any) -> None:
        _synchronise(self.model)
        start = time.perf_counter()
        super()._prefill(*args)
        _synchronise(self.model)
        self.prefill_seconds += time.perf_counter() - start


def _speed(sampler: Sampler, requests: list[Request], decoding: Decoding) -> dict[str, float]:
    _synchronise(sampler.model)
    before, start = sampler.forwards, time.perf_counter()
    tokens = sum(len(t.response_ids) for t in sampler.generate(requests, decoding))
    _synchronise(sampler.model)
    seconds, passes = time.perf_counter() - start, sampler.forwards - before
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "ms_per_pass": 1e3 * seconds / passes,
        "passes": passes,
    }


def _sampler(model: Any, sequences: int, fast: bool, kind: type[Sampler] = Sampler) -> Sampler:
    return kind(
        model, block_size=BLOCK, mask_token_id=model.config.vocab_size - 1, eos_token_id=-1,
        slots=sequences, seed=0, cuda_graphs=fast, compiled=fast,
    )  # fmt: skip


def _requests(sequences: int, prompt: int, new_tokens: int, block: int = BLOCK) -> list[Request]:
    """Every response ends with a block, so that all tokens that a pass makes count."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 200, size=prompt + i % BLOCK) for i in range(sequences)]
    limits = [grid_ceil(len(ids) + new_tokens, block) - len(ids) for ids in prompts]
    return [Request(i, 0, ids, limit) for i, (ids, limit) in enumerate(zip(prompts, limits, strict=True))]


def profile(size: str, device: str, sequences: int, prompt: int, new_tokens: int) -> list[Operator]:
    """Of static decoding; on CUDA of 64 new tokens at most, from graphs."""
    sampler = _sampler(random_model(size, device), sequences, device == "cuda")
    requests, decoding = _requests(sequences, prompt, new_tokens), Decoding(StaticUnmasking(), 1.0)
    for _ in range(2 if device == "cuda" else 1):
        for _ in sampler.generate(requests, decoding):
            pass

    def passes() -> int:
        before = sampler.forwards
        for _ in sampler.generate(_requests(sequences, prompt, min(new_tokens, 64)), decoding):
            pass
        return sampler.forwards - before

    return hottest(passes, device)


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
