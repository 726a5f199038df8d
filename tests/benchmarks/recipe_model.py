"""What a recipe takes on many GPUs, on paper: from rates measured on one GPU and a few assumptions, both named below.

A simulation of one rollout batch: lengths of responses are drawn, dealt out to rollout actors and learner ranks as the
pipeline does, and every stage takes as long as its slowest member.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from common.config import ModelShape, RunConfig
from deploy.placement import plan
from learner.packing import assign_ranks
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
    publish = [row for row in published if row["way"] != "slow reference"]
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
    prompts, batch_rows = scale * config.rollout.prompts_per_batch, scale * config.learner.batch_rows
    lengths = _lengths(prompts, assumed.response, config.curriculum.max_tokens)
    response = float(lengths.sum())
    read = response + prompts * assumed.prompt
    rollout = _rollout_seconds(shape, lengths, split.rollout, rates, assumed)
    teacher_rate = split.teacher * rates.teacher * rates.products / (2 * _layers(shape))
    last = config.rollout.stream_rows * (config.curriculum.max_tokens + assumed.prompt)
    learner, packed = _learner_seconds(config, shape, lengths, batch_rows, split.learner, rates, assumed)
    weights = 2 * shape.parameters
    nodes = {role: -(-count // assumed.gpus_per_node) for role, count in vars(split).items()}
    alone = split.used <= assumed.gpus_per_node
    away = 0 if alone else nodes["rollout"]  # a store elsewhere passes on what it has
    publish = weights / (rates.publish or assumed.publish) + (
        math.ceil(math.log2(away + 1)) * weights / assumed.objects
    )
    per_target = config.teacher.top_k * 8 + 4 if config.target_kind == "topk" else 2 * shape.hidden_size
    plain = response * 26 + prompts * assumed.prompt * 4
    annotated = plain + response * assumed.trained * per_target
    micro_batches = prompts / batch_rows * max(packed / (prompts / batch_rows) / split.learner / 16384, 1)
    sharded = 3 * weights * micro_batches * split.learner if split.learner > assumed.gpus_per_node else 0.0
    return Estimate(
        split=split,
        seconds={
            "rollout": rollout,
            "teacher": read / teacher_rate,
            "last targets": last / (teacher_rate / split.teacher),
            "learner": learner,
            "publish": publish,
        },
        tokens_per_second={
            "rollout": response / rollout, "teacher": teacher_rate, "learner": packed / learner,
        },
        network={
            "weights": weights * away,
            "trajectories": 0.0 if alone else plain + annotated * nodes["learner"],
            "ZeRO-3": sharded,
        },
        object_store=2 * weights + (1 + config.pipeline.staleness) * (plain + annotated),
    )  # fmt: skip


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
def _lengths(count: int, mean: float, limit: int) -> np.ndarray:
    """Tokens of `count` responses, float [count], in a seeded order: an exponential's quantiles, cut at the limit."""
    quantiles = -np.log1p(-(np.arange(count) + 0.5) / count)
    low, high = 0.0, 100.0 * mean
    while high - low > 1e-6 * mean:
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(middle * quantiles, limit).mean() < mean else (low, middle)
    return np.random.default_rng(0).permutation(np.minimum(low * quantiles, limit))


def _rollout_seconds(shape: ModelShape, lengths: np.ndarray, actors: int, rates: Rates, assumed: Assumed) -> float:
    """The slowest actor: as many passes as its longest response needs, all slots in each."""
    slowest = 0.0
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


def _learner_seconds(
    config: RunConfig, shape: ModelShape, lengths: np.ndarray, rows: int, ranks: int, rates: Rates, assumed: Assumed
) -> tuple[float, float]:
    """All updates of the batch, each as long as its slowest rank computes or ZeRO-3 gathers; and the packed tokens."""
    head = shape.vocab_size * shape.hidden_size
    channel = assumed.link if ranks <= assumed.gpus_per_node else assumed.network
    seconds = 0.0
    for start in range(0, len(lengths), rows):
        update = lengths[start : start + rows]
        tokens = assumed.prompt + 2 * update
        shares = assign_ranks([int(n) for n in tokens], ranks)
        flops = [6 * sum(_layers(shape) * tokens[i] + head * assumed.trained * update[i] for i in s) for s in shares]
        longest = max(sum(tokens[i] for i in s) for s in shares)
        passes = math.ceil(longest / config.learner.max_tokens_per_microbatch)
        # weights twice, for forward and backward, and gradients once
        moved = 3 * 2 * shape.parameters * passes * (ranks - 1) / ranks
        seconds += max(max(flops) / (rates.learner * rates.products), moved / channel)
    return float(seconds), float(len(lengths) * assumed.prompt + 2 * lengths.sum())


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
