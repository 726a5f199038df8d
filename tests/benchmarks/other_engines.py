"""The original in engines that others serve it with, asked for the same prompts: transformers' continuous batching,
and vLLM where it is installed. Both decode autoregressively, greedily, and keep no prefixes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from common.student import load_model
from deploy.dashboard.process import free_port
from tests.benchmarks.clients import MODEL, Asks, Body, Times, arrivals, asks_over_http

_PAGE = 256  # tokens
_START_SECONDS, _END_SECONDS = 300.0, 30.0


@contextmanager
def vllm(folder: str, device: str, most: int, longest: int, log: Path, ends: bool) -> Iterator[Asks]:
    """vLLM's server, for `most` sequences at the same time; responses end before their limit where `ends`.

    Raises:
        ModuleNotFoundError: it is not installed.
        RuntimeError: it does not start.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ModuleNotFoundError("vLLM is not installed")
    port = free_port("127.0.0.1", 0)
    words = [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", MODEL),
        *("--host", "127.0.0.1", "--port", port, "--max-model-len", longest, "--max-num-seqs", most),
        *("--dtype", _dtype(device), "--no-enable-prefix-caching"),
        *(("--gpu-memory-utilization", 0.5) if device == "cuda" else ()),
    ]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it would be compiled with nvcc, and greedy tokens need none
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, *map(str, words)], stdout=out, stderr=out, env=environment | dict(os.environ)
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", server, log)
        ask = asks_over_http(f"http://127.0.0.1:{port}")
        own = {"temperature": 0, "ignore_eos": not ends}
        yield lambda bodies, rate, count: ask([body | own for body in bodies], rate, count)
    finally:
        server.terminate()
        try:
            server.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()


@contextmanager
def transformers(folder: str, device: str, most: int, longest: int, ends: bool) -> Iterator[Asks]:
    """transformers' continuous batching in this process, without a server before it; as `vllm`."""
    model = load_model(folder, getattr(torch, _dtype(device)), "sdpa").to(device).eval()
    pages = most * (-(-longest // _PAGE) + 1)
    cache = ContinuousBatchingConfig(
        num_blocks=pages, max_batch_tokens=max(longest, 2048), max_requests_per_batch=most, allow_block_sharing=False
    )
    own = model.generation_config
    stops = own.eos_token_id if ends else -1
    settings = GenerationConfig(do_sample=False, eos_token_id=stops, pad_token_id=own.pad_token_id or 0)
    with model.continuous_batching_context_manager(settings, continuous_batching_config=cache) as manager:
        yield lambda bodies, rate, count: _asked(manager, bodies, rate, count)


def _asked(manager: Any, bodies: list[Body], rate: float | None, count: int) -> list[Times]:
    """As many at once as there are clients, or each when it is due."""
    start = time.perf_counter()
    due = [0.0] * len(bodies) if rate is None else arrivals(len(bodies), rate)
    sent: dict[str, float] = {}
    found: list[Times] = []
    following = 0
    while len(found) < len(bodies):
        now = time.perf_counter() - start
        open_ones = len(sent) - len(found)
        while following < len(bodies) and due[following] <= now and (rate is not None or open_ones < count):
            body = bodies[following]
            name = manager.add_request(body["prompt"], max_new_tokens=body["max_tokens"], record_timestamps=True)
            sent[name] = start + now
            following, open_ones = following + 1, open_ones + 1
        pause = due[following] - now if rate is not None and following < len(bodies) else 1.0
        done = manager.get_result(timeout=max(min(pause, 1.0), 1e-3))
        if done is None and not manager.is_running():
            raise RuntimeError("transformers' thread has ended; see the log")
        if done is not None and done.is_finished():
            if done.error:
                raise RuntimeError(done.error)
            times = done.timestamps
            found.append(Times(sent[done.request_id], times[0], times[-1], len(done.generated_tokens)))
    return found


def _dtype(device: str) -> str:
    return "bfloat16" if device == "cuda" else "float32"


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                last = " / ".join(log.read_text().splitlines()[-3:])
                raise RuntimeError(f"vLLM has not started: {last[-600:]}") from None
            time.sleep(0.5)
