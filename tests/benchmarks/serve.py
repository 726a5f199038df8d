"""The server against the bare sampler on the same requests, beside the original in the engines of others: tokens per
second, and how long clients wait.

Clients are in a process of their own. In the closed loop each of them sends its next request when the one before has
ended, so all slots are in use: that is the overhead. In the open loop requests come at random times (Poisson), at 80%
of what the closed loop did, whatever the server answers: that is how long clients wait. No system keeps prefixes.

A random model's end tokens are ignored, and it decodes one token a step. A student's own folder (--model) answers the
prompts of a file (--prompts) as `opdlm serve` does by default, greedily, until its end tokens; --original is the folder
of the model that the other engines serve.
"""

from __future__ import annotations

import gc
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn

from actors.evaluation.generation import load_student, sampler_of
from actors.sampler.request import Request
from actors.sampler.sampling import Decoding
from common.config.data import DataConfig
from common.config.unmasking import DynamicUnmasking, StaticUnmasking
from common.prompts import load_prompts
from common.seeds import stream_key
from deploy.dashboard.process import free_port
from deploy.demo.tiny_arlm import build_tokenizer
from deploy.serving.app import Server, create_app
from deploy.serving.asked import prompter_of
from deploy.serving.engine import Engine
from deploy.serving.http import PromptHttp
from deploy.serving.metrics import ServingMetrics
from tests.benchmarks.clients import MODEL, Asks, Body, asks_over_http, measured
from tests.benchmarks.lengths import uneven_lengths
from tests.benchmarks.loop import Wanted
from tests.benchmarks.models import random_model, save_random_model
from tests.benchmarks.other_engines import transformers, vllm

CLIENTS = (1, 8, 32, 128)
BLOCK = 4
_LEAST = 16  # requests of a row
_NOTHING = Wanted()


def measure(
    size: str,
    device: str,
    requests: int,
    prompt: int,
    new_tokens: int,
    clients: tuple[int, ...] = CLIENTS,
    wanted: Wanted = _NOTHING,
) -> Iterator[dict[str, Any]]:
    """A row for every system and number of clients, which is that of the slots; `requests` for each slot. What cannot
    be measured here has a row with the reason, `skipped`. No row is begun after `wanted.seconds`."""
    clock = _Clock(wanted.seconds)
    clients = wanted.clients or clients
    facts = {"size": size} | ({"model": wanted.model} if wanted.model else {})
    student, tokenizer, decoding, bodies = _student(size, device, prompt, new_tokens, requests * max(clients), wanted)
    for count in clients:
        asked = bodies[: max(requests * count, _LEAST)]
        row = facts | {"system": "opdlm", "clients": count, "requests": len(asked)}
        yield row | (_ours(student, tokenizer, decoding, asked, count) if clock.runs else clock.over)
    del student
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()  # vLLM is another process
    if wanted.model and not wanted.original:
        yield facts | {"system": "transformers, vllm", "skipped": "there is no --original"}
        return
    longest = max(_length(body) for body in bodies) + BLOCK
    with tempfile.TemporaryDirectory() as folder:
        if not wanted.original:
            save_random_model(size, device, f"{folder}/original")
        original, ends = wanted.original or f"{folder}/original", wanted.model is not None
        for system, opened in (
            ("vllm", vllm(original, device, max(clients), longest, Path(folder) / "log", ends)),
            ("transformers", transformers(original, device, max(clients), longest, ends)),
        ):
            yield from _theirs(facts | {"system": system}, opened, bodies, requests, clients, clock)


class _Clock:
    """The time budget."""

    over = {"skipped": "the time was over"}  # noqa: RUF012

    def __init__(self, seconds: float | None) -> None:
        self._end = time.monotonic() + seconds if seconds else float("inf")

    @property
    def runs(self) -> bool:
        return time.monotonic() < self._end


def _theirs(
    facts: dict[str, Any],
    opened: AbstractContextManager[Asks],
    bodies: list[Body],
    requests: int,
    clients: tuple[int, ...],
    clock: _Clock,
) -> Iterator[dict[str, Any]]:
    if not clock.runs:
        yield facts | clock.over
        return
    try:
        start = time.monotonic()
        with opened as asks:
            facts["start_seconds"] = time.monotonic() - start
            for count in clients:
                asked = bodies[: max(requests * count, _LEAST)]
                row = facts | {"clients": count, "requests": len(asked)}
                yield row | (measured(asks, asked, count) if clock.runs else clock.over)
    except Exception as error:  # whatever is wrong with one engine, the next is measured
        yield facts | {"skipped": f"{type(error).__name__}: {error}"}


def _ours(model: Any, tokenizer: Any, decoding: Decoding, bodies: list[Body], count: int) -> dict[str, Any]:
    seconds, tokens, steps = _bare(model, tokenizer, decoding, bodies, count)
    with _Served(model, tokenizer, decoding, count, max(map(_length, bodies)) + BLOCK, len(bodies)) as url:
        row = measured(asks_over_http(url), bodies, count)
    bare = tokens / seconds
    return {
        "bare_tokens_per_second": bare,
        "tokens_per_step": tokens / steps,
        "overhead": bare / row["tokens_per_second"] - 1,
    } | row


def _length(body: Body) -> int:
    return len(body["prompt"]) + int(body["max_tokens"])


def _student(
    size: str, device: str, prompt: int, new_tokens: int, count: int, wanted: Wanted
) -> tuple[Any, Any, Decoding, list[Body]]:
    """The student, its tokenizer, how it decodes, and the requests."""
    count = max(count, _LEAST)
    if wanted.model is None:
        model, tokenizer = random_model(size, device), build_tokenizer()
        model.config.mask_token_id = tokenizer.mask_token_id
        model.config.block_size = BLOCK
        model.generation_config.eos_token_id = [-1]
        return model, tokenizer, Decoding(StaticUnmasking(), 1.0), _bodies(count, prompt, new_tokens)
    model, tokenizer = load_student(wanted.model, "bfloat16" if device == "cuda" else "float32", device)
    data = DataConfig(prompts=wanted.prompts or "deploy/data/word_problems_heldout.jsonl", limit=count)
    prompts = [p.ids.tolist() for p in load_prompts(data, tokenizer, 0).prompts]
    bodies = [{"prompt": prompts[i % len(prompts)], "max_tokens": new_tokens, "seed": i} for i in range(count)]
    return model, tokenizer, Decoding(DynamicUnmasking(), 0.0), bodies


def _bodies(count: int, prompt: int, new_tokens: int) -> list[Body]:
    rng = np.random.default_rng(0)
    prompts, limits = uneven_lengths(prompt, count), uneven_lengths(new_tokens, count)[::-1]
    return [
        {"prompt": rng.integers(0, 200, size=p).tolist(), "max_tokens": n, "seed": i}
        for i, (p, n) in enumerate(zip(prompts, limits, strict=True))
    ]


def _bare(model: Any, tokenizer: Any, decoding: Decoding, bodies: list[Body], slots: int) -> tuple[float, int, int]:
    """Seconds, tokens and denoising steps of the sampler alone."""
    sampler = sampler_of(model, tokenizer, block_size=int(model.config.block_size), slots=slots)
    asked = [
        Request(i, 0, np.asarray(b["prompt"], np.int32), b["max_tokens"], key=stream_key(b["seed"], 0, 0))
        for i, b in enumerate(bodies)
    ]
    for _ in sampler.generate(asked[: 2 * slots], decoding):  # first uses
        pass
    start = time.perf_counter()
    made = list(sampler.generate(asked, decoding))
    seconds = time.perf_counter() - start
    return seconds, sum(len(t.response_ids) for t in made), sum(t.denoise_forwards for t in made)


class _Served:
    """The server in a thread; entered when it answers."""

    def __init__(self, model: Any, tokenizer: Any, decoding: Decoding, slots: int, longest: int, queue: int) -> None:
        engine = Engine(
            model, tokenizer, slots=slots, longest=longest, queue_limit=queue, metrics=ServingMetrics(), prefix_tokens=0
        )
        block_size = int(model.config.block_size)
        prompter = prompter_of(
            tokenizer, {}, block_size=block_size, longest=longest, most_tokens=longest, decoding=decoding
        )
        self.port = free_port("127.0.0.1", 0)
        app = create_app(Server(engine, prompter, MODEL, "127.0.0.1"))
        self.web = uvicorn.Server(uvicorn.Config(app, port=self.port, http=PromptHttp, ws="none", log_level="error"))
        self.thread = threading.Thread(target=self.web.run)

    def __enter__(self) -> str:
        self.thread.start()
        while not self.web.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{self.port}"

    def __exit__(self, *_: Any) -> None:
        self.web.should_exit = True
        self.thread.join()
