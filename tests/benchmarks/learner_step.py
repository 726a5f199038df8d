"""The learner's forward and backward: useful FLOPs per second and peak memory, by variant, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from common.config.divergences import ForwardKL
from common.config.objective import ObjectiveConfig
from common.states import select_states
from common.student import hidden_states
from common.trajectory import Trajectory, TrajectoryMeta
from learner.batches import BatchBuilder
from learner.liger import use_liger_kernels
from learner.objective import ChunkedDivergence, divergence, empty_sums
from learner.packing import MicroBatch, coefficients, document, microbatch
from tests.benchmarks.lengths import uneven_lengths
from tests.benchmarks.models import matmul_rate, random_model
from tests.benchmarks.operators import Operator, hottest

BLOCK = 4


def measure(size: str, device: str, rows: int, prompt: int, response: int, max_tokens: int) -> Iterator[dict[str, Any]]:
    """One update's forward and backward, a row for each variant.

    `chunked` is the learner's own: packed rows, LM head at masked positions, in chunks. `dense` is what it replaces:
    float32 logits of student and teacher at every position. On CUDA also without recomputation, and with Liger's
    kernels. One row is of `uneven_rows`.
    """
    cuda = device == "cuda"
    model, builder, trajectories = _ready(size, device, rows, prompt, response, max_tokens)
    rate = matmul_rate(device)
    uneven = random_trajectories(
        model.config.hidden_size, *uneven_rows(device, rows, prompt, response), cuda, uneven=True
    )
    first = 0.0
    with_liger = False
    for variant in _ON_CUDA if cuda else _ON_CPU:
        if variant.liger and not with_liger:
            use_liger_kernels(model)
            with_liger = True
        if variant.recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        used = uneven if variant.uneven else trajectories
        metrics = _time(model, builder, used, variant.loss, variant.padded)
        flops = useful_flops(model.config, metrics["tokens"], metrics["masked"])
        metrics["useful_tflops"] = flops / metrics["seconds"] / 1e12
        metrics |= {"mfu": flops / metrics["seconds"] / rate, "product_tflops": rate / 1e12}
        if first and not variant.uneven:
            metrics["times_the_first"] = metrics["seconds"] / first
        first = first or metrics["seconds"]
        yield {"size": size, "variant": variant.name, "rows": len(used), **metrics}


def uneven_rows(device: str, rows: int, prompt: int, response: int) -> tuple[int, int, int]:
    """Rows, prompt and mean response of an update of uneven rows: some 8,000 packed tokens on CUDA, else as planned."""
    return (16, 64, 220) if device == "cuda" else (rows, prompt, response)


def profile(size: str, device: str, rows: int, prompt: int, response: int, max_tokens: int) -> list[Operator]:
    """Of the learner's own step; on CUDA with Liger's kernels and activations kept."""
    model, builder, trajectories = _ready(size, device, rows, prompt, response, max_tokens)
    if device == "cuda":
        use_liger_kernels(model)
    _time(model, builder, trajectories, _chunked_loss, False)

    def step() -> int:
        _step(model, builder, trajectories, _chunked_loss, False)
        return 1

    return hottest(step, device)


def _ready(
    size: str, device: str, rows: int, prompt: int, response: int, max_tokens: int
) -> tuple[Any, BatchBuilder, list[Trajectory]]:
    """A model in training, what packs its batches, and one update's trajectories."""
    model = random_model(size, device)
    attention = "flex_attention" if device == "cuda" else "sdpa"
    model.set_attn_implementation(attention)
    model.train()
    trajectories = random_trajectories(model.config.hidden_size, rows, prompt, response, device == "cuda")
    meta = TrajectoryMeta(BLOCK, model.config.vocab_size - 1, "benchmark", "hidden", model.config.hidden_size)
    head = model.lm_head.weight.detach().clone()
    return (
        model,
        BatchBuilder(meta, "row_mean", "bucket", max_tokens, attention, torch.device(device), head),
        trajectories,
    )


def useful_flops(config: Any, tokens: float, masked: float) -> float:
    """Forward and backward products: the layers at every token of a document, the LM head at masked positions.

    Attention's own products and all recomputation are left out.
    """
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    layers = config.num_hidden_layers * config.hidden_size * (heads + 3 * config.intermediate_size)
    return 6 * (layers * tokens + config.vocab_size * config.hidden_size * masked)


def _padded(builder: BatchBuilder, trajectories: list[Trajectory]) -> list[MicroBatch]:
    """One trajectory a row, all as wide as the longest, in one micro-batch."""
    documents = {i: document(t, BLOCK, builder.meta.mask_token_id) for i, t in enumerate(trajectories)}
    weights = dict(enumerate(coefficients(list(documents.values()), builder.normalization)))
    return [microbatch([[i] for i in documents], documents, weights)]


def _time(
    model: Any, builder: BatchBuilder, trajectories: list[Trajectory], loss_of: Any, padded: bool
) -> dict[str, float]:
    cuda = builder.device.type == "cuda"
    tokens = masked = 0
    for attempt in range(3):
        if attempt == 1:  # the first one compiles
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start, tokens, masked = time.perf_counter(), 0, 0
        used = _step(model, builder, trajectories, loss_of, padded)
        tokens, masked = tokens + used[0], masked + used[1]
    if cuda:
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    seconds = (time.perf_counter() - start) / 2
    model.zero_grad()
    return {"seconds": seconds, "tokens": tokens // 2, "masked": masked // 2, "peak_gib": peak}


def _step(
    model: Any, builder: BatchBuilder, trajectories: list[Trajectory], loss_of: Any, padded: bool
) -> tuple[int, int]:
    """Forward and backward of one update; its tokens and masked positions."""
    tokens = masked = 0
    model.zero_grad()
    for micro in _padded(builder, trajectories) if padded else builder.update(trajectories, 0, 1)[0]:
        x = builder.tensors(micro, trajectories)
        hidden = hidden_states(model, x.ids, x.positions, x.mask)
        loss_of(model, hidden, x).backward()
        tokens += x.tokens
        masked += len(x.loss_index)
    return tokens, masked


def _chunked_loss(model: Any, hidden: torch.Tensor, x: Any) -> torch.Tensor:
    rows = hidden.reshape(-1, hidden.shape[-1])[x.loss_index]
    return ChunkedDivergence.apply(
        rows, model.lm_head.weight, x.target, x.coefficient, ForwardKL(), 1024, empty_sums(hidden.device)
    )


def _dense_loss(model: Any, hidden: torch.Tensor, x: Any) -> torch.Tensor:
    """As the predecessor: the LM head and float32 log-softmax over every position, student and teacher."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    teacher_hidden = torch.zeros_like(flat)
    teacher_hidden[x.loss_index] = x.target.hidden.to(flat.dtype)
    coefficient = torch.zeros(len(flat), device=flat.device).index_put((x.loss_index,), x.coefficient)
    log_t = (teacher_hidden @ x.target.head.T).float().log_softmax(-1)
    log_s = (flat @ model.lm_head.weight.T).float().log_softmax(-1)
    return (coefficient * divergence(ForwardKL(), log_t, log_s)).sum()


def random_trajectories(
    width: int, rows: int, prompt: int, response: int, cuda: bool, block: int = BLOCK, uneven: bool = False
) -> list[Trajectory]:
    """With hidden states of that width as targets; on CPU of all lengths up to `response`, on CUDA all as long, or
    `uneven` with that mean, as those of real responses."""
    rng = np.random.default_rng(0)
    lengths = [int(response * (1 if cuda else (i + 1) / rows)) for i in range(rows)]
    made = []
    for i, wanted in enumerate(uneven_lengths(response, rows) if uneven else lengths):
        length = -(-wanted // block) * block
        t = Trajectory(
            ordinal=i,
            sample=0,
            prompt_ids=rng.integers(0, 200, prompt).astype(np.int32),
            response_ids=rng.integers(0, 200, length).astype(np.int32),
            tail_ids=np.empty(0, np.int32),
            reveal_round=np.tile(np.arange(block), length // block).astype(np.int16),
            confidence=np.ones(length, np.float32),
            weights_version=0,
            finish_reason="length",
            denoise_forwards=1,
            commit_forwards=0,
        )
        select_states(t, ObjectiveConfig(), block, -1, rng)
        t.hidden = rng.standard_normal(len(t.target_offsets) * width).astype(np.float32)
        made.append(t)
    return made


class _Variant(NamedTuple):
    name: str
    loss: Callable[[Any, torch.Tensor, Any], torch.Tensor]
    padded: bool = False  # to the longest, not packed
    recomputed: bool = False
    liger: bool = False
    uneven: bool = False


_ON_CPU = (
    _Variant("packed, chunked", _chunked_loss),
    _Variant("padded to the longest, chunked", _chunked_loss, padded=True),
    _Variant("packed, chunked, uneven rows", _chunked_loss, uneven=True),
    _Variant("packed, dense", _dense_loss),
    _Variant("padded to the longest, dense", _dense_loss, padded=True),
)
_ON_CUDA = (
    _Variant("chunked, all activations kept", _chunked_loss),
    _Variant("chunked, all activations kept, uneven rows", _chunked_loss, uneven=True),
    _Variant("chunked, recomputed", _chunked_loss, recomputed=True),
    _Variant("dense, recomputed", _dense_loss, recomputed=True),
    _Variant("chunked, all activations kept, Liger", _chunked_loss, liger=True),
    _Variant("chunked, recomputed, Liger", _chunked_loss, recomputed=True, liger=True),
)
