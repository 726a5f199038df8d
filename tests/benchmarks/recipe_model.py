"""What a recipe takes on many GPUs, on paper: from rates measured on one GPU and a few assumptions, both named below.

A simulation of one rollout batch: lengths of responses are drawn, dealt out to rollout actors and learner ranks as the
pipeline does, and every stage takes as long as its slowest member.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from common.config.model import ModelShape
from common.config.run import RunConfig
from deploy.placement import plan
from tests.benchmarks.models import SIZES

BLOCK = 4


@dataclass(frozen=True)
class Rates:
    """Of one GPU, measured (tests.benchmarks). `of_floor` is the sampler's share of what the hardware allows, the
    two utilisations are shares of `products`. The teacher counts as measured where its benchmark was run, else as a
    forward of the learner; `publish`, bytes per second, is None where it was not measured."""

    device: str
    copy: float  # bytes read and written per second
    products: float  # FLOP/s of a large bfloat16 product
    of_floor: float
    learner: float
    teacher: float
    teacher_measured: bool
    publish: float | None
    sampler_of: str  # what was measured, in words
    learner_of: str


@dataclass(frozen=True)
class Assumed:
    """Not measured: hardware by its data sheet, the published run, and a distribution of lengths.

    Response lengths are exponential, cut at the limit, with the published mean. `publish` is the rate of bringing new
    weights into the samplers of a node, where it was not measured, `objects` that of one node's object store to
    another, `network` and `link` what a GPU's NCCL sees between nodes and within one; bytes per second.
    """

    gpus_per_node: int = 8
    link: float = 450e9
    network: float = 50e9
    objects: float = 5e9
    publish: float = 8e9
    prompt: int = 200  # tokens, mean
    response: float = 0.066e9 / 61_816  # tokens, mean: published for 8B
    trained: float = 0.62  # share of response positions that one realised round per block leaves masked
    tokens_per_step: int = 2


@dataclass(frozen=True)
class Batch:
    """A rollout batch and its updates: prompts, rows per update, mean and greatest response length in tokens, and the
    token budget of one forward."""

    prompts: int
    rows: int
    mean: float
    limit: int
    budget: int


@dataclass(frozen=True)
class Split:
    """GPUs by role."""

    rollout: int
    teacher: int
    learner: int

    @property
    def used(self) -> int:
        return self.rollout + self.teacher + self.learner


@dataclass(frozen=True)
class Estimate:
    """One rollout batch on a split: seconds and tokens per second by stage, bytes by purpose."""

    split: Split
    seconds: dict[str, float]
    tokens_per_second: dict[str, float]
    network: dict[str, float]
    object_store: float

    @property
    def batch_seconds(self) -> tuple[float, float]:
        """At staleness 0 the stages take turns (the teacher overlaps rollouts but for what comes last); at staleness 1
        the slowest sets the pace."""
        s = self.seconds
        in_turn = max(s["rollout"], s["teacher"]) + s["last targets"] + s["learner"] + s["publish"]
        return in_turn, max(s["rollout"], s["teacher"], s["learner"] + s["publish"])


def rates(results: dict[str, Any]) -> Rates:
    """From the JSON of `tests.benchmarks --device cuda`; the largest size that was measured counts.

    Raises:
        ValueError: there are no rows of the sampler at two tokens a step, or none of the learner.
    """
    sampler = [row for key, rows in results.items() if key.startswith("sampler ") for row in rows]
    learner = [row for key, rows in results.items() if key.startswith("learner ") for row in rows if row.get("mfu")]
    fast = [row for row in sampler if row["tokens_per_step"] == 2 and row.get("of_floor")]
    if not fast or not learner:
        raise ValueError("the results lack the sampler at two tokens a step or the learner; run both parts on CUDA")
    order = list(SIZES)
    largest = max(fast, key=lambda row: (order.index(row["size"]), -row["sequences"]))
    best = max(learner, key=lambda row: (order.index(row["size"]), row["mfu"]))
    products = best["useful_tflops"] * 1e12 / best["mfu"]
    teacher = [row for key, rows in results.items() if key.startswith("teacher ") for row in rows]
    causal = [row for row in teacher if row["variant"] == "causal"]
    published = [row for key, rows in results.items() if key.startswith("publish ") for row in rows]
    publish = [row for row in published if row["way"] == "object_store"]  # the recipes' transport
    teacher_share = best["mfu"]
    if causal:
        row = max(causal, key=lambda row: order.index(row["size"]))
        teacher_share = 2 * _layers(_shape(row["size"])) * row["tokens_per_second"] / products
    return Rates(
        device=results["device"],
        copy=max(_floor_bytes_per_second(row) for row in sampler if row.get("floor_tokens_per_second")),
        products=products,
        of_floor=largest["of_floor"],
        learner=best["mfu"],
        teacher=teacher_share,
        teacher_measured=bool(causal),
        publish=max((row["gb_per_s"] * 1e9 for row in publish), default=None),
        sampler_of=f"{largest['size'].upper()}, {largest['sequences']} sequences, two tokens a step",
        learner_of=f"{best['size'].upper()}, {best['variant']}",
    )


def estimate(config: RunConfig, split: Split, rates: Rates, assumed: Assumed, scale: int = 1) -> Estimate:
    """One rollout batch at the curriculum's full length; `scale` multiplies prompts and rows per update."""
    shape = plan(config).shape
    batch = Batch(
        prompts=scale * config.rollout.prompts_per_batch,
        rows=scale * config.learner.batch_rows,
        mean=assumed.response,
        limit=config.curriculum.max_tokens,
        budget=config.learner.max_tokens_per_microbatch,
    )
    response = float(_lengths(batch).sum())
    read = response + batch.prompts * assumed.prompt
    packed = response + read
    rollout = _rollout_seconds(shape, batch, split.rollout, rates, assumed)
    teacher = rates.teacher * rates.products / (2 * _layers(shape))  # tokens per second of one
    last = config.rollout.stream_rows * (batch.limit + assumed.prompt) / teacher
    learner = _learner_seconds(shape, batch, split.learner, rates, assumed)
    weights = 2 * shape.parameters
    nodes = {role: -(-count // assumed.gpus_per_node) for role, count in vars(split).items()}
    alone = split.used <= assumed.gpus_per_node
    away = 0 if alone else nodes["rollout"]
    # a store passes on what it has received
    publish = weights / (rates.publish or assumed.publish) + math.ceil(math.log2(away + 1)) * weights / assumed.objects
    per_target = config.teacher.top_k * 8 + 4 if config.target_kind == "topk" else 2 * shape.hidden_size
    plain = response * 26 + batch.prompts * assumed.prompt * 4
    annotated = plain + response * assumed.trained * per_target
    passes = batch.prompts / batch.rows * max(batch.rows / batch.prompts * packed / split.learner / batch.budget, 1.0)
    spans_nodes = split.learner > assumed.gpus_per_node
    return Estimate(
        split=split,
        seconds={
            "rollout": rollout,
            "teacher": read / (split.teacher * teacher),
            "last targets": last,
            "learner": learner,
            "publish": publish,
        },
        tokens_per_second={
            "rollout": response / rollout,
            "teacher": split.teacher * teacher,
            "learner": packed / learner,
        },
        network={
            "weights": float(weights * away),
            "trajectories": 0.0 if alone else plain + annotated * nodes["learner"],
            "ZeRO-3": 3.0 * weights * passes * split.learner if spans_nodes else 0.0,
        },
        object_store=2 * weights + (1 + config.pipeline.staleness) * (plain + annotated),
    )


def best_split(config: RunConfig, gpus: int, rates: Rates, assumed: Assumed, scale: int = 1) -> Estimate:
    """The split with the shortest batch at staleness 1; among those within two hundredths, that of the fewest GPUs."""
    found = [estimate(config, split, rates, assumed, scale) for split in _splits(config, gpus, scale)]
    shortest = min(e.batch_seconds[1] for e in found)
    return min((e for e in found if e.batch_seconds[1] <= 1.02 * shortest), key=lambda e: e.split.used)


def _splits(config: RunConfig, gpus: int, scale: int) -> Iterator[Split]:
    """Learner ranks are bounded by the rows of an update, and from below by memory: 16 bytes a parameter in 80 GB."""
    least = math.ceil(16 * plan(config).shape.parameters / 80e9)
    counts = sorted({*range(1, 9), *(2**i for i in range(10)), *(3 * 2**i for i in range(9))})
    for learner in counts:
        for rollout in counts:
            for teacher in counts:
                fits = learner + rollout + teacher <= gpus
                if fits and least <= learner <= scale * config.learner.batch_rows:
                    if rollout <= scale * config.rollout.prompts_per_batch:
                        yield Split(rollout, teacher, learner)


@cache
def _lengths(batch: Batch) -> np.ndarray:
    """Tokens of the responses, float [prompts], in a seeded order: an exponential's quantiles, cut at the limit."""
    count, mean, limit = batch.prompts, batch.mean, batch.limit
    quantiles = -np.log1p(-(np.arange(count) + 0.5) / count)
    low, high = 0.0, 100.0 * mean
    while high - low > 1e-6 * mean:
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(middle * quantiles, limit).mean() < mean else (low, middle)
    return np.random.default_rng(0).permutation(np.minimum(low * quantiles, limit))


@cache
def _rollout_seconds(shape: ModelShape, batch: Batch, actors: int, rates: Rates, assumed: Assumed) -> float:
    """The slowest actor: as many passes as its longest response needs, all slots in each."""
    lengths, slowest = _lengths(batch), 0.0
    for actor in range(actors):
        share = lengths[actor::actors]
        passes = math.ceil(share.max() / assumed.tokens_per_step)
        lives = share / assumed.tokens_per_step / passes  # share of the passes in which a sequence is read
        cached = float((lives * (assumed.prompt + share / 2)).sum())
        slowest = max(slowest, passes * _pass_seconds(shape, len(share), cached, rates))
    return slowest


def _pass_seconds(shape: ModelShape, slots: int, cached: float, rates: Rates) -> float:
    read = _layers(shape) + shape.vocab_size * shape.hidden_size
    memory = (2 * read + 2 * cached * shape.kv_elements_per_token) / rates.copy
    return max(memory, 2 * read * slots * BLOCK / rates.products) / rates.of_floor


@cache
def _learner_seconds(shape: ModelShape, batch: Batch, ranks: int, rates: Rates, assumed: Assumed) -> float:
    """All updates of the batch, each as long as its slowest rank computes or ZeRO-3 gathers."""
    head = shape.vocab_size * shape.hidden_size
    channel = assumed.link if ranks <= assumed.gpus_per_node else assumed.network
    lengths, seconds = _lengths(batch), 0.0
    for start in range(0, len(lengths), batch.rows):
        update = lengths[start : start + batch.rows]
        tokens = assumed.prompt + 2 * update
        flops = 6 * (_layers(shape) * tokens + head * assumed.trained * update)
        rank = _dealt(tokens, ranks)
        passes = math.ceil(np.bincount(rank, tokens).max() / batch.budget)
        # weights twice, for forward and backward, and gradients once
        moved = 3 * 2 * shape.parameters * passes * (ranks - 1) / ranks
        seconds += max(float(np.bincount(rank, flops).max()) / (rates.learner * rates.products), moved / channel)
    return seconds


def _dealt(tokens: np.ndarray, ranks: int) -> np.ndarray:
    """The rank of each row, as learner/packing.py assigns them: the longest first, to the least loaded."""
    loads = [(0.0, rank) for rank in range(ranks)]
    dealt = np.empty(len(tokens), np.int64)
    for row in np.argsort(-tokens, kind="stable"):
        load, dealt[row] = loads[0]
        heapq.heapreplace(loads, (load + tokens[row], int(dealt[row])))
    return dealt


def _floor_bytes_per_second(row: dict[str, Any]) -> float:
    """The copy bandwidth behind a sampler row's floor, where memory set it; less where products did."""
    shape, tokens_per_step = _shape(row["size"]), row["tokens_per_step"]
    seconds = row["sequences"] * BLOCK / ((BLOCK // tokens_per_step + 1) * row["floor_tokens_per_second"])
    context = 128 + 512 // 2  # the prompts of tests/benchmarks, half-way through the new tokens
    return (2 * shape.parameters + 2 * row["sequences"] * context * shape.kv_elements_per_token) / seconds


def _shape(size: str) -> ModelShape:
    s = SIZES[size]
    return ModelShape(
        hidden_size=s["hidden_size"], layers=s["num_hidden_layers"], heads=s["num_attention_heads"],
        kv_heads=s["num_key_value_heads"], head_dim=s["head_dim"], intermediate_size=s["intermediate_size"],
        vocab_size=s["vocab_size"], tied_embeddings=True,
    )  # fmt: skip


def _layers(shape: ModelShape) -> int:
    """Parameters of the decoder layers."""
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    return shape.parameters - embeddings


def read_rates(path: Path) -> Rates:
    return rates(json.loads(path.read_text()))
