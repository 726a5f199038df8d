"""The learner's forward and backward: useful FLOPs per second, peak memory, packed against padded rows."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from common.objective_config import ForwardKL, ObjectiveConfig
from common.states import select_states
from common.student import hidden_states
from common.trajectory import Trajectory, TrajectoryMeta
from learner.batches import BatchBuilder
from learner.objective import ChunkedDivergence, divergence, empty_sums
from tests.benchmarks.models import random_model

BLOCK = 4


def measure(size: str, device: str, rows: int, prompt: int, response: int, max_tokens: int) -> list[dict[str, Any]]:
    """One update's forward and backward: packed, masked-only and chunked, against dense logits of every position."""
    model = random_model(size, device)
    attention = "flex_attention" if device == "cuda" else "sdpa"
    model.set_attn_implementation(attention)
    model.train()
    if device == "cuda":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trajectories = _trajectories(model, rows, prompt, response)
    meta = TrajectoryMeta(BLOCK, model.config.vocab_size - 1, "benchmark", "hidden", model.config.hidden_size)
    head = model.lm_head.weight.detach().clone()
    builder = BatchBuilder(meta, "row_mean", "bucket", max_tokens, attention, torch.device(device), head)
    fast = _time(model, builder, trajectories, dense=False)
    dense = _time(model, builder, trajectories, dense=True)
    parameters = sum(p.numel() for p in model.parameters())
    flops = 6 * parameters * fast["tokens"]
    return [
        {
            "size": size,
            "rows": rows,
            "tokens": fast["tokens"],
            "seconds": fast["seconds"],
            "tokens_per_second": fast["tokens"] / fast["seconds"],
            "useful_tflops": flops / fast["seconds"] / 1e12,
            "peak_gib": fast["peak_gib"],
            "dense_seconds": dense["seconds"],
            "dense_peak_gib": dense["peak_gib"],
            "ratio": dense["seconds"] / fast["seconds"],
        }
    ]


def _time(model: Any, builder: BatchBuilder, trajectories: list[Trajectory], dense: bool) -> dict[str, float]:
    cuda = builder.device.type == "cuda"
    tokens = 0
    for attempt in range(3):
        if attempt == 1:  # the first one compiles
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start, tokens = time.perf_counter(), 0
        model.zero_grad()
        for micro in builder.update(trajectories, 0, 1)[0]:
            x = builder.tensors(micro, trajectories)
            hidden = hidden_states(model, x.ids, x.positions, x.mask)
            loss = (_dense_loss if dense else _chunked_loss)(model, hidden, x)
            loss.backward()
            tokens += x.tokens
    if cuda:
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return {"seconds": (time.perf_counter() - start) / 2, "tokens": tokens // 2, "peak_gib": peak}


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


def _trajectories(model: Any, rows: int, prompt: int, response: int) -> list[Trajectory]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(rows):
        length = response - response % BLOCK
        t = Trajectory(
            ordinal=i,
            sample=0,
            prompt_ids=rng.integers(0, 200, prompt).astype(np.int32),
            response_ids=rng.integers(0, 200, length).astype(np.int32),
            tail_ids=np.empty(0, np.int32),
            reveal_round=np.tile(np.arange(BLOCK), length // BLOCK).astype(np.int16),
            confidence=np.ones(length, np.float32),
            weights_version=0,
            finish_reason="length",
            denoise_forwards=1,
            commit_forwards=0,
        )
        select_states(t, ObjectiveConfig(), BLOCK, -1, rng)
        t.hidden = rng.standard_normal(len(t.target_offsets) * model.config.hidden_size).astype(np.float32)
        made.append(t)
    return made
