"""An update as a rank of the learner makes it: ZeRO stage 3 with one rank, forward, backward and AdamW's step."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import torch

from common.config.run import RunConfig
from common.trajectory import TrajectoryMeta
from tests.benchmarks.learner_step import BLOCK, random_trajectories, uneven_rows, useful_flops
from tests.benchmarks.models import matmul_rate, save_random_model
from tests.benchmarks.operators import Operator, hottest

_REPEATS = 3


def measure(size: str, device: str, rows: int, prompt: int, response: int, max_tokens: int) -> Iterator[dict[str, Any]]:
    """Updates of `rows` trajectories, then of uneven ones; on CUDA with all activations kept, with compiled layers and
    then without, by Liger's kernels where these are installed."""
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(size, device, folder)
        for lengths, plan in (
            ("even", (rows, prompt, response)),
            ("uneven", uneven_rows(device, rows, prompt, response)),
        ):
            for compiled in (True, False) if device == "cuda" else (False,):
                uneven = lengths == "uneven"
                row = _in_a_process(_metrics, folder, device, *plan, max_tokens, uneven, compiled)
                yield {"size": size, **row, "lengths": lengths, "compiled": compiled}


def profile(size: str, device: str, rows: int, prompt: int, response: int, max_tokens: int) -> list[Operator]:
    """Of one update."""
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(size, device, folder)
        return _in_a_process(_operators, folder, device, rows, prompt, response, max_tokens)


def _in_a_process(call: Callable[..., Any], *arguments: Any) -> Any:
    """DeepSpeed takes its accelerator when it is imported, and its process group stays."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def _metrics(folder: str, device: str, rows: int, *plan: int) -> dict[str, Any]:
    rank, update = _ready(folder, device, rows, *plan)
    steps: list[float] = []
    step = rank.engine.step

    def timed_step() -> float:
        start = _now(device)
        norm: float = step()
        steps.append(_now(device) - start)
        return norm

    rank.engine.step = timed_step
    for _ in range(2):  # compiles, then fills the buffers
        metrics = update()
    steps.clear()
    start = _now(device)
    for _ in range(_REPEATS):
        metrics = update()
    seconds = (_now(device) - start) / _REPEATS
    row = {
        "rows": rows,
        "seconds": seconds,
        "optimizer_seconds": sum(steps) / _REPEATS,
        "tokens": int(metrics["packed_tokens"]),
        "masked": int(metrics["positions"]),
    }
    if device == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["liger"] = rank.config.learner.liger_kernels
    rate = matmul_rate(device)
    flops = useful_flops(rank.conversion.config, row["tokens"], row["masked"])
    return row | {"mfu": flops / seconds / rate, "product_tflops": rate / 1e12}


def _operators(folder: str, device: str, *plan: int) -> list[Operator]:
    _, update = _ready(folder, device, *plan)
    for _ in range(2):
        update()

    def once() -> int:
        update()
        return 1

    return hottest(once, device)


def _ready(
    folder: str,
    device: str,
    rows: int,
    prompt: int,
    response: int,
    max_tokens: int,
    uneven: bool = False,
    compiled: bool = False,
    equal: bool = False,
) -> tuple[Any, Callable[[], dict[str, float]]]:
    """A rank that has started, and what makes it do an update; rows `equal` in length on CPU too."""
    cuda = device == "cuda"
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    from learner.rank import LearnerRank

    learner = {
        "ranks": 1,
        "batch_rows": rows,
        "max_tokens_per_microbatch": max_tokens,
        "dtype": "bfloat16" if cuda else "float32",
        "gradient_checkpointing": False,
        "liger_kernels": cuda and not compiled and find_spec("liger_kernel") is not None,
        "compile": compiled,
        "resources": {"gpus": int(cuda), "threads": torch.get_num_threads()},
    }
    config = RunConfig.model_validate(
        {"block_size": BLOCK, "model": {"path": folder}, "data": {"prompts": folder}, "learner": learner}
    )
    rank = LearnerRank(config, 0)
    rank.start("127.0.0.1", rank.address()[1])
    width = rank.conversion.config.hidden_size
    meta = TrajectoryMeta(BLOCK, rank.conversion.config.mask_token_id, "benchmark", "hidden", width)
    trajectories = random_trajectories(width, rows, prompt, response, cuda or equal, uneven=uneven)
    builders = rank._builders(meta, ())

    def update() -> dict[str, float]:
        prepared = rank.updater.prepared([trajectories], builders)
        totals, wrong = rank.updater.step(*rank.updater.accumulated(prepared, builders, False))
        assert not wrong, wrong
        return totals

    return rank, update


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
