"""OPDLM's released code beside this project's, in one run on weights of the same shape: sampler and optimizer batch.

`--parts predecessor --reference FOLDER` takes a checkout of that code; what it replaces stands in released_code.py.
"""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.sampler.sampling import Decoding
from actors.teacher.targets import TargetRequest
from common.config.errors import ConfigError
from common.config.resources import Resources
from common.config.teacher import TeacherConfig
from common.config.unmasking import StaticUnmasking
from tests.benchmarks import learner_rank, released_code, sampler, teacher
from tests.benchmarks.models import random_model
from tests.benchmarks.tokenizers import benchmark_tokenizer

ROWS = 8  # of its optimizer batch
_MICRO_BATCH_TOKENS = 16384
Row = dict[str, Any]


def measure(
    size: str, device: str, prompts: int, prompt: int, new_tokens: int, reference: str | None, tokenizer: str | None
) -> Iterator[Row]:
    """Rows of `sampler` (on CUDA: its engine runs nowhere else), of an `update` with everything on the GPU, of a
    `rollout batch`: the sampler's run and the training on all of its prompts, and of an update as released, with
    optimizer and weights in host memory. Each has the released code's seconds, ours, and their ratio. Our training on a
    rollout batch is as many times the update as it has updates.

    Both samplers reveal one token a step and ignore end tokens. An update has rows of equal length and one state for
    each block; ours has the teacher's forwards in its time as the released one has.

    Raises:
        ConfigError: no checkout is given.
    """
    if reference is None or not (Path(reference) / "configs" / "rl_bd3lm.yaml").is_file():
        raise ConfigError(f"--reference: {reference!r} is no checkout of divelab/OPDLM; give the folder of one")
    with tempfile.TemporaryDirectory() as name:
        ours, theirs = _folders(Path(name), size, device, tokenizer)
        sampled = None
        if device == "cuda":
            released = _alone(released_code.sample, reference, ours, prompts, prompt, new_tokens)
            sampled = _row("sampler", released, _alone(_sample, size, device, prompts, prompt, new_tokens))
            yield {"size": size} | sampled
        own = _alone(_targets, size, device, prompt, new_tokens)
        own += _alone(_update, ours, device, prompt, new_tokens)
        plan = (reference, theirs, ours, device, ROWS, prompt, new_tokens)
        updated = _alone(released_code.update, *plan, "none", prompts if sampled else 0)
        trained = updated.pop("whole_seconds", None)
        yield {"size": size} | _row("update", updated, own)
        if sampled:
            whole = {"seconds": sampled["released_s"] + trained, "prompts": prompts}
            yield {"size": size} | _row("rollout batch", whole, sampled["ours_s"] + own * prompts / ROWS)
        offloaded = _alone(released_code.update, *plan, "cpu")
        yield {"size": size} | _row("update, offloaded as released", offloaded, own)


def _row(what: str, released: Row, ours: float) -> Row:
    facts = {name: value for name, value in released.items() if name != "seconds"}
    seconds = released["seconds"]
    return {"what": what, "released_s": seconds, "ours_s": ours, "ratio": seconds / ours, **facts}


def _alone(call: Callable[..., Any], *arguments: Any) -> Any:
    """In a process of its own, which gives its memory back."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def _folders(root: Path, size: str, device: str, tokenizer_path: str | None) -> tuple[str, str]:
    """One model twice: as it is, and under the type that the released code gives its students."""
    ours, theirs = root / "model", root / "student"
    tokenizer = benchmark_tokenizer(size, tokenizer_path)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>", "pad_token": "<|pad|>"})
    rows = {"vocab_size": len(tokenizer)} if size == "tiny" else {}
    random_model(size, device, **rows).save_pretrained(ours)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    tokenizer.save_pretrained(ours)
    shutil.copytree(ours, theirs)
    config = json.loads((theirs / "config.json").read_text())
    config |= {"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"]}
    (theirs / "config.json").write_text(json.dumps(config))
    return str(ours), str(theirs)


def _sample(size: str, device: str, sequences: int, prompt: int, new_tokens: int) -> float:
    """Seconds of our sampler, after two runs that compile and capture."""
    made = sampler._sampler(random_model(size, device), sequences, device == "cuda")
    requests, decoding = sampler._requests(sequences, prompt, new_tokens), Decoding(StaticUnmasking(), 1.0)
    for _ in range(2):
        for _ in made.generate(requests, decoding):
            pass
    measured = sampler._speed(made, requests, decoding)
    return measured["tokens"] / measured["tokens_per_second"]


def _targets(size: str, device: str, prompt: int, response: int) -> float:
    """Seconds of our teacher for one update's rows."""
    config = TeacherConfig(
        backend="transformers", target="hidden", dtype="bfloat16" if device == "cuda" else "float32",
        max_batched_tokens=_MICRO_BATCH_TOKENS, resources=Resources(gpus=int(device == "cuda")),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    asked = []
    for _ in range(ROWS):
        trained = np.sort(rng.choice(response, int(teacher.TRAINED * response), replace=False))
        asked.append(TargetRequest(rng.integers(10, 200, prompt + response).astype(np.int32), prompt + trained))
    backend = teacher.LoadedBackend(random_model(size, device), config)
    return teacher._time(lambda: backend.targets(asked), device)[0]


def _update(folder: str, device: str, prompt: int, response: int) -> float:
    """Seconds of our learner for the same rows, with optimizer; compiled on CUDA."""
    plan = (ROWS, prompt, response, _MICRO_BATCH_TOKENS, False, device == "cuda", True)
    seconds: float = learner_rank._metrics(folder, device, *plan)["seconds"]
    return seconds
