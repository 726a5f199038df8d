"""The server against the bare sampler, on the same requests: tokens per second, and how long clients wait.

Clients are in a process of their own. In the closed loop each of them sends its next request when the one before has
ended, so all slots are in use: that is the overhead. In the open loop requests come at random times (Poisson), at 80%
of what the bare sampler can do, whatever the server answers: that is how long clients wait. End tokens are ignored.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import uvicorn

from actors.evaluation.generation import sampler_of
from actors.sampler.request import Request
from actors.sampler.sampling import Decoding
from common.config.unmasking import StaticUnmasking
from common.seeds import stream_key
from deploy.dashboard.process import free_port
from deploy.demo.tiny_arlm import build_tokenizer
from deploy.serving.app import Server, create_app
from deploy.serving.asked import prompter_of
from deploy.serving.engine import Engine
from deploy.serving.http import PromptHttp
from deploy.serving.metrics import ServingMetrics
from tests.benchmarks.clients import Times, ask_all
from tests.benchmarks.lengths import uneven_lengths
from tests.benchmarks.models import random_model

CLIENTS = (1, 8, 32, 128)
LOAD = 0.8  # of the open loop, as a share of what the bare sampler does
BLOCK = 4
PERCENTILES = (50, 90, 99)


def measure(
    size: str, device: str, requests: int, prompt: int, new_tokens: int, clients: tuple[int, ...] = CLIENTS
) -> Iterator[dict[str, Any]]:
    """A row for every number of clients, which is that of the slots; `requests` for each slot, at least 32 in all."""
    model = random_model(size, device)
    tokenizer = build_tokenizer()
    model.config.mask_token_id = tokenizer.mask_token_id
    model.config.block_size = BLOCK
    model.generation_config.eos_token_id = [-1]
    for count in clients:
        total = max(requests * count, min(32, 8 * requests))
        bodies = _bodies(total, prompt, new_tokens)
        longest = max(len(b["prompt"]) + b["max_tokens"] for b in bodies) + BLOCK
        seconds, tokens = _bare(model, tokenizer, bodies, count)
        row: dict[str, Any] = {"size": size, "clients": count, "requests": total}
        row["bare_tokens_per_second"] = tokens / seconds
        with _Served(model, tokenizer, count, longest, total) as url:
            _clients(url, bodies[: 2 * count], None, count)  # first uses
            closed = _clients(url, bodies, None, count)
            opened = _clients(url, bodies, LOAD * total / seconds, count)
        row["tokens_per_second"] = tokens / _span(closed)
        row["overhead"] = row["bare_tokens_per_second"] / row["tokens_per_second"] - 1
        row["open_tokens_per_second"] = tokens / _span(opened)
        for name, column in (("first_block", 1), ("latency", 2)):
            waits = [times[column] - times[0] for times in opened]
            for percent in PERCENTILES:
                row[f"{name}_p{percent}_seconds"] = float(np.percentile(waits, percent))
        yield row


def _bodies(count: int, prompt: int, new_tokens: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    prompts, limits = uneven_lengths(prompt, count), uneven_lengths(new_tokens, count)[::-1]
    return [
        {"prompt": rng.integers(0, 200, size=p).tolist(), "max_tokens": n, "seed": i, "stream": True}
        for i, (p, n) in enumerate(zip(prompts, limits, strict=True))
    ]


def _bare(model: Any, tokenizer: Any, bodies: list[dict[str, Any]], slots: int) -> tuple[float, int]:
    """Seconds and tokens of the sampler alone."""
    sampler = sampler_of(model, tokenizer, block_size=BLOCK, slots=slots)
    decoding = Decoding(StaticUnmasking(), 1.0)
    asked = [
        Request(i, 0, np.asarray(b["prompt"], np.int32), b["max_tokens"], key=stream_key(b["seed"], 0, 0))
        for i, b in enumerate(bodies)
    ]
    for _ in sampler.generate(asked[: 2 * slots], decoding):  # first uses
        pass
    start = time.perf_counter()
    tokens = sum(len(t.response_ids) for t in sampler.generate(asked, decoding))
    return time.perf_counter() - start, tokens


class _Served:
    """The server in a thread; entered when it answers."""

    def __init__(self, model: Any, tokenizer: Any, slots: int, longest: int, queue: int) -> None:
        engine = Engine(model, tokenizer, slots=slots, longest=longest, queue_limit=queue, metrics=ServingMetrics())
        decoding = Decoding(StaticUnmasking(), 1.0)
        prompter = prompter_of(tokenizer, {}, block_size=BLOCK, longest=longest, most_tokens=longest, decoding=decoding)
        self.port = free_port("127.0.0.1", 0)
        app = create_app(Server(engine, prompter, "random", "127.0.0.1"))
        self.web = uvicorn.Server(uvicorn.Config(app, port=self.port, http=PromptHttp, ws="none", log_level="error"))
        self.thread = threading.Thread(target=self.web.run)

    def __enter__(self) -> str:
        self.thread.start()
        while not self.web.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{self.port}/v1/completions"

    def __exit__(self, *_: Any) -> None:
        self.web.should_exit = True
        self.thread.join()


def _clients(url: str, bodies: list[dict[str, Any]], rate: float | None, count: int) -> list[Times]:
    """The times of every request; `rate` in requests a second, or None: `count` clients in a closed loop."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=ask_all, args=(url, bodies, rate, count, sender))
    process.start()
    sender.close()
    times: list[Times] = receiver.recv()
    process.join()
    return times


def _span(times: list[Times]) -> float:
    return max(end for _, _, end in times) - min(sent for sent, _, _ in times)
