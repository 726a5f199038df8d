"""The teacher: one causal pass over x0 for the trained positions, against what it replaces, and its peak memory."""

from __future__ import annotations

import gc
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from actors.teacher.targets import TargetRequest, Targets
from actors.teacher.transformers_backend import TransformersBackend, causal_hidden_states
from common.config.resources import Resources
from common.config.teacher import TeacherConfig
from common.padded_batches import padded_batches
from tests.benchmarks.models import random_model
from tests.benchmarks.operators import Operator, hottest

TOP_K = 16
TRAINED = 0.62  # share of the response that per_block selection masks at about two tokens a step
_REPEATS = 3


def measure(
    size: str, device: str, requests: int, prompt: int, response: int, max_tokens: int
) -> Iterator[dict[str, Any]]:
    """Rows by variant, all of one run.

    `causal` is the teacher's own: sequences share forwards of at most `max_tokens`, the LM head reads trained
    positions. `one at a time` asks it request by request. The predecessor reads every row doubled, x0 and behind it
    the noised response; `doubled` is that with the LM head where it is needed, `doubled, every position` with float32
    log-probabilities of all. Peak memory, on CUDA, is over the weights, and also that of four times the requests.
    vLLM's engine, where it is installed, answers the same requests with either kind of target; its peak is over what it
    holds at rest, KV cache included.
    """
    config = _config(device, max_tokens)
    model = random_model(size, device)
    asked = _requests(requests, prompt, response, model.config.vocab_size)
    first = 0.0  # tokens per second of the first row
    for row in _of_transformers(LoadedBackend(model, config), asked, prompt, device):
        first = first or row["tokens_per_second"]
        yield {"size": size, **row, "times_the_first": first / row["tokens_per_second"]}
    if importlib.util.find_spec("vllm"):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            gc.collect()
            torch.cuda.empty_cache()
            for target in ("topk", "hidden"):
                row = {"size": size, "variant": f"vLLM, {target}", **_of_vllm(config, target, folder, asked)}
                yield row | {"times_the_first": first / row["tokens_per_second"]}


def profile(size: str, device: str, requests: int, prompt: int, response: int, max_tokens: int) -> list[Operator]:
    """Of the teacher's own pass."""
    model = random_model(size, device)
    backend = LoadedBackend(model, _config(device, max_tokens))
    asked = _requests(requests, prompt, response, model.config.vocab_size)
    backend.targets(asked)

    def once() -> int:
        backend.targets(asked)
        return 1

    return hottest(once, device)


def _config(device: str, max_tokens: int) -> TeacherConfig:
    cuda = device == "cuda"
    return TeacherConfig(
        backend="transformers", target="topk", top_k=TOP_K, dtype="bfloat16" if cuda else "float32",
        max_batched_tokens=max_tokens, resources=Resources(gpus=1 if cuda else 0),
    )  # fmt: skip


def _of_transformers(
    backend: LoadedBackend, asked: list[TargetRequest], prompt: int, device: str
) -> Iterator[dict[str, Any]]:
    doubled = [replace(r, ids=np.concatenate([r.ids, r.ids[prompt:]])) for r in asked]
    tokens = sum(len(r.ids) for r in asked)
    variants: dict[str, tuple[int, Callable[[], object]]] = {
        "causal": (1, lambda: backend.targets(asked)),
        "causal, four times the requests": (4, lambda: backend.targets(asked * 4)),
        "one at a time": (1, lambda: [backend.targets([request]) for request in asked]),
        "doubled": (1, lambda: backend.whole(doubled, every_position=False)),
        "doubled, every position": (1, lambda: backend.whole(doubled, every_position=True)),
    }
    for name, (times, run) in variants.items():
        seconds, peak = _time(run, device)
        row = {"variant": name, "requests": times * len(asked), "tokens_per_second": times * tokens / seconds}
        yield row | ({"peak_gib": peak} if device == "cuda" else {})


class LoadedBackend(TransformersBackend):
    """Around a model that is in memory already."""

    def __init__(self, model: Any, config: TeacherConfig) -> None:
        self._loaded = model
        super().__init__(config, "")

    def _load(self, config: TeacherConfig, model_path: str) -> Any:
        return self._loaded

    @torch.inference_mode()
    def whole(self, requests: Sequence[TargetRequest], every_position: bool) -> list[Targets]:
        """As the predecessor: no sequence ends at its last asked position; targets of every position on demand."""
        made = []
        for rows in padded_batches([len(r.ids) for r in requests], self.budget.value):
            batch = [requests[row] for row in rows]
            hidden = causal_hidden_states(
                self.model, [replace(r, positions=np.arange(1, len(r.ids) + 1)) for r in batch]
            )
            for states, request in zip(hidden, batch, strict=True):
                wanted = torch.from_numpy(request.positions - 1)
                if not every_position:
                    made.append(self._targets_of(states[wanted]))
                    continue
                logprobs = self.model.lm_head(states).float().log_softmax(-1)
                made.append(logprobs[wanted].topk(self.width).values.cpu())
        return made


def _requests(count: int, prompt: int, response: int, vocabulary: int) -> list[TargetRequest]:
    """Responses of all lengths up to `response`; a random part of their positions is trained."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        length = max(response * (i + 1) // count, 4)
        chosen = rng.choice(length, max(int(TRAINED * length), 1), replace=False)
        ids = rng.integers(0, min(vocabulary, 1000), prompt + length).astype(np.int32)
        made.append(TargetRequest(ids, prompt + np.sort(chosen)))
    return made


def _time(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds of one call, best of three after one more, and GiB over what was allocated before."""
    run()
    cuda = device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times), (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else 0.0


def _of_vllm(config: TeacherConfig, target: str, folder: str, requests: list[TargetRequest]) -> dict[str, float]:
    """vLLM in a process of its own, which gives its memory back."""
    config = config.model_copy(update={"backend": "vllm", "gpu_memory_utilization": 0.5, "target": target})
    # a child must not inherit an initialised CUDA
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_vllm_metrics, config, folder, requests).result()


def _vllm_metrics(config: TeacherConfig, folder: str, requests: list[TargetRequest]) -> dict[str, float]:
    from actors.teacher.actor import build_backend

    backend = build_backend(config, folder)
    cuda = config.resources.gpus > 0
    seconds, peak = _time(lambda: backend.targets(requests), "cuda" if cuda else "cpu")
    backend.close()
    row = {"requests": len(requests), "tokens_per_second": sum(len(r.ids) for r in requests) / seconds}
    return row | {"peak_gib": peak} if cuda else row
