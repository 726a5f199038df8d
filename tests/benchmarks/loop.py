"""The whole `opdlm train` with a real tokenizer, prompts of real lengths and responses of uneven lengths.

Weights are random, in the shape of the size, unless a model is given; random weights never end a response. So every
prompt has a length limit of its own, drawn from a log-normal distribution: each of 64 limits is a domain of the prompts
file, and `data.domain_max_tokens` gives the domain its limit, as it would in any run.

Two runs are made: the first finds empty caches of compiled code; the second, of one batch, those that the first has
left. With a time budget the first run ends early enough for the second, which is taken to need as long to its first
batch as the first run did.
"""

from __future__ import annotations

import json
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer

from common.config.file import REPOSITORY
from common.datasets.rows import open_rows
from deploy.roles import ROLES
from learner.phase_clock import PHASES
from tests.benchmarks.learner_step import useful_flops
from tests.benchmarks.lengths import quantiles
from tests.benchmarks.models import matmul_rate, random_model
from tests.benchmarks.mps import multi_process_service
from tests.benchmarks.tokenizers import benchmark_tokenizer
from tests.benchmarks.train_run import Row, TrainRun, train

WARM_UP = 2  # batches: the first compiles, the second meets what it did not
MEDIAN = 0.3  # of the lengths, as a share of the longest
_LIMITS = 64
_PROMPTS = REPOSITORY / "deploy" / "data" / "word_problems_train.jsonl"
_SAMPLE_SECONDS = 0.25


@dataclass(frozen=True)
class Setting:
    """Of a size: the longest response, slots and prompts per rollout actor, rows per rank, and the token budgets of the
    learner's and the teacher's forwards. Twice as many prompts as slots keep the slots in use."""

    longest: int
    slots: int
    prompts: int
    rows: int
    learner_tokens: int
    teacher_tokens: int
    recompute: bool = False


SETTINGS = {
    "tiny": Setting(64, 4, 8, 4, 2048, 2048),
    "135m": Setting(1024, 256, 512, 16, 32768, 32768),
    "0.6b": Setting(1024, 128, 256, 16, 16384, 16384),
    "4b": Setting(512, 64, 128, 16, 16384, 8192, recompute=True),  # shorter, so that 22 batches take minutes
}
# whole GPUs of learner, rollout actors and teachers; without a teacher's own it shares with the rollout actors, and
# without theirs with the learner
SPLITS = {1: "1:0:0", 2: "1:1:0", 3: "1:1:1", 4: "2:1:1", 8: "4:3:1"}


@dataclass(frozen=True)
class Wanted:
    """What the command line chooses: splits of the GPUs (default: by their number), the tokenizer's folder or file
    (default: by size, tests/benchmarks/tokenizers.py), or a folder with tokenizer and weights, a file of prompts
    (default: the repository's word problems), fields of the run, seconds for a split's two runs (default: as long as
    they take), and whether they share GPUs by MPS; of the server its clients, and the folder of the original."""

    gpus: int = 1
    splits: tuple[str, ...] = ()
    tokenizer: str | None = None
    model: str | None = None
    prompts: str | None = None
    fields: tuple[str, ...] = ()
    seconds: float | None = None
    mps: bool = False
    clients: tuple[int, ...] = ()
    original: str | None = None


def measure(size: str, device: str, batches: int, wanted: Wanted = Wanted()) -> Iterator[Row]:
    """A row per split, of `batches` rollout batches after the warm-up or as many as the time budget allows, one at
    least. Each row comes twice: after the first run, and, with `*_cached_s`, after the second.

    `gpu_busy` is NVML's share of the time in which a kernel ran, by GPU; None without GPUs. `learner_seconds` says
    where a batch's training goes (learner/phase_clock.py). `loading_*_s` is from the command to the start of training,
    `first_batch_*_s` from there to the end of the first batch. `learner_mfu` is the useful products over what all ranks
    could have made in their training seconds at the rate of a large product.

    Raises:
        CalledProcessError: a run failed; its output was shown.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # what it used of the GPU is given back
            model, rate = pool.submit(_prepare, size, device, wanted, folder / "model").result()
        for split in wanted.splits or (SPLITS[wanted.gpus],):
            parts = _parts(split) if device == "cuda" else (1, 1, 1)
            gpus = sum(parts) if device == "cuda" else 0
            fields = ["--cache_dir", str(folder / f"caches-{split.replace(':', '-')}"), *wanted.fields]
            needed = (WARM_UP + batches) * SETTINGS[size].prompts * max(parts[1], 1)
            written = _write_prompts(wanted.prompts or str(_PROMPTS), folder / "prompts.jsonl", size, needed)
            config = _config(size, model, folder, math.ceil(needed / written), parts, gpus)
            environment = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))} if gpus else {}
            # a service of its own for each run: one whose clients were ended at once may be of no use to others
            with multi_process_service(wanted.mps) as shared, GpuUse(gpus) as use:
                most = ["--pipeline.max_batches", str(WARM_UP + batches)]
                cold = train(config, most + fields, environment | shared, _late(wanted.seconds))
            row = _facts(size, model, split, gpus, wanted) | metrics(cold.rows[WARM_UP:])
            row["gpu_busy"] = use.shares(cold.rows[WARM_UP - 1]["time"], cold.rows[-1]["time"])
            row["learner_mfu"] = _mfu(model, cold.rows[WARM_UP:], rate * parts[0])
            row |= {"loading_cold_s": cold.loading, "first_batch_cold_s": cold.first_batch}
            yield row
            with multi_process_service(wanted.mps) as shared:
                cached = train(config, ["--pipeline.max_batches", "1", *fields], environment | shared)
            row |= {"loading_cached_s": cached.loading, "first_batch_cached_s": cached.first_batch}
            yield row


def _facts(size: str, model: str, split: str, gpus: int, wanted: Wanted) -> Row:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return {
        "size": size,
        "gpus": gpus,
        "split": split if gpus else None,
        "card": torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0] if gpus else "cpu",
        "fields": " ".join(wanted.fields),
        "mps": wanted.mps,
        "weights": "real" if wanted.model else "random",
        "vocabulary": AutoConfig.from_pretrained(model).vocab_size,
        "tokenizer_entries": len(tokenizer),
    }


def _late(seconds: float | None) -> Callable[[TrainRun], bool] | None:
    """Whether a run must end for a second one that takes as long to its first batch; not before it can be measured."""
    if seconds is None:
        return None
    return lambda run: len(run.rows) > WARM_UP and time.time() - run.start + run.loading + run.first_batch > seconds


def metrics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of consecutive batches: means, and shares of their whole wall time."""
    wall = sum(row["seconds/batch"] for row in rows)

    def share(name: str) -> float:
        return sum((row[name] or 0.0) * row["seconds/batch"] for row in rows) / wall  # null: no such processes

    def mean(name: str) -> float:
        return float(np.mean([row[name] for row in rows]))

    tokens = sum(row["response_length"] * row["queue/rollout"] for row in rows)
    updates = rows[-1]["updates"] - rows[0]["updates"]
    update = sum(row["seconds/learner"] for row in rows[1:]) / updates if updates else None
    slots = [row["rollout/slots_in_use"] for row in rows if row.get("rollout/slots_in_use") is not None]
    return {
        "batches": len(rows),
        "response_length": mean("response_length"),
        "tokens_per_second": tokens / wall,
        "seconds_per_batch": wall / len(rows),
        **{f"seconds_{stage}": mean(f"seconds/{stage}") for stage in (*ROLES, "publish")},
        **{f"busy_{role}": share(f"busy/{role}") for role in ROLES},
        "overhead": share("overhead"),
        "slots_in_use": float(np.mean(slots)) if slots else None,
        "update_s": update,
        "learner_seconds": {phase: mean(f"learner/{phase}_s") for phase in PHASES},
    }


def length_limits(longest: int) -> list[int]:
    """The drawn limits, the shortest first: quantiles of the log-normal distribution, `longest` at most."""
    return np.ceil(np.clip(longest * MEDIAN * quantiles(_LIMITS), 1, longest)).astype(int).tolist()


class GpuUse:
    """Samples how busy the first GPUs are, in a thread, while it is entered; does nothing for none."""

    def __init__(self, gpus: int) -> None:
        self._gpus = gpus
        self._samples: list[tuple[float, list[int]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> GpuUse:
        if self._gpus:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._gpus:
            self._thread.join()

    def shares(self, begin: float, end: float) -> list[float] | None:
        """Of each GPU between two Unix times."""
        inside = [use for at, use in self._samples if begin <= at <= end]
        return [float(share) / 100 for share in np.mean(inside, axis=0)] if inside else None

    def _sample(self) -> None:
        from ray._private.thirdparty import pynvml  # nvidia-ml-py, which Ray brings

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._gpus)]
        while not self._stop.wait(_SAMPLE_SECONDS):
            use = [pynvml.nvmlDeviceGetUtilizationRates(handle).gpu for handle in handles]
            self._samples.append((time.time(), use))
        pynvml.nvmlShutdown()


def _prepare(size: str, device: str, wanted: Wanted, out: Path) -> tuple[str, float]:
    """The folder of the model, written to `out` where none is given, and FLOP/s of a large product."""
    rate = matmul_rate(device)
    if wanted.model:
        return wanted.model, rate
    tokenizer = benchmark_tokenizer(size, wanted.tokenizer)
    vocabulary = {"vocab_size": len(tokenizer)} if size == "tiny" else {}
    random_model(size, device, **vocabulary).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return str(out), rate


def _write_prompts(source: str, out: Path, size: str, most: int) -> int:
    """The first rows of `source`, each in the domain of its length limit; how many they are."""
    limits = length_limits(SETTINGS[size].longest)
    drawn = np.random.default_rng(0)
    written = 0
    with out.open("w") as file:
        for _, row in islice(open_rows(source), most):
            file.write(json.dumps({**row, "domain": f"t{drawn.choice(limits)}"}, default=str) + "\n")
            written += 1
    return written


def _parts(split: str) -> tuple[int, int, int]:
    learner, rollout, teacher = (int(count) for count in split.split(":"))
    return learner, rollout, teacher


def _config(size: str, model: str, folder: Path, epochs: int, parts: tuple[int, int, int], gpus: int) -> dict[str, Any]:
    """Of a run on so many GPUs; without any, on CPU."""
    s, (learner, rollout, teacher) = SETTINGS[size], parts
    dtype = "bfloat16" if gpus else "float32"
    cpus, threads = (2, 2) if gpus else (0.3, 1)
    # shares of one GPU
    of_learner, of_rollout = (1.0 if rollout else 0.34), (1.0 if teacher else 0.6)
    if not rollout:
        of_rollout = 0.33
    of_teacher = 1.0 if teacher else 0.33 if not rollout else 0.4

    def resources(gpu: float) -> dict[str, float]:
        return {"cpus": cpus, "threads": threads, "gpus": gpu if gpus else 0}

    prompts = s.prompts * max(rollout, 1)
    return {
        "name": "loop",
        "block_size": 4,
        "model": {"path": model},
        "data": {
            "prompts": str(folder / "prompts.jsonl"),
            "max_prompt_tokens": 512,
            "epochs": epochs,
            "domain_max_tokens": {f"t{limit}": limit for limit in length_limits(s.longest)},
        },
        "rollout": {
            "actors": max(rollout, 1),
            "slots": s.slots,
            "prompts_per_batch": prompts,
            "dtype": dtype,
            "max_batched_tokens": 16384,
            "resources": resources(of_rollout),
        },
        "teacher": {
            "actors": max(teacher, 1),
            "backend": "transformers",
            "target": "hidden",
            "dtype": dtype,
            "max_batched_tokens": s.teacher_tokens,
            "resources": resources(of_teacher),
        },
        "curriculum": {"schedule": "constant", "min_tokens": s.longest, "max_tokens": s.longest},
        "learner": {
            "ranks": learner,
            "batch_rows": s.rows * learner,
            "max_tokens_per_microbatch": s.learner_tokens,
            "dtype": dtype,
            "gradient_checkpointing": s.recompute,
            "compile": bool(gpus),
            "resources": resources(of_learner),
        },
        "publish": {"transport": "auto"},
        "pipeline": {"staleness": 1, "checkpoint_every_minutes": 0},
    }


def _mfu(model: str, rows: list[dict[str, Any]], rate: float) -> float:
    """Of the batches' updates; `rate` is that of all ranks together, FLOP/s."""
    config = AutoConfig.from_pretrained(model)
    seconds = sum(row["seconds/learner"] for row in rows)
    tokens = sum(row["learner/tokens_per_second"] * row["seconds/learner"] for row in rows)
    return useful_flops(config, tokens, sum(row["trained_positions"] for row in rows)) / seconds / rate
