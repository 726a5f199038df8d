"""How cost grows, on CPU: sweeps over sequences, length, block size, vocabulary and actors at the tiny size.

Besides its rows it leaves docs/benchmarks/scaling.json, docs/images/scaling.png and the tables of docs/scaling.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding
from common.config.resources import Resources
from common.config.teacher import TeacherConfig
from common.config.unmasking import StaticUnmasking
from common.trajectory import TrajectoryMeta
from learner.batches import BatchBuilder
from tests.benchmarks import learner_step, pipeline, sampler, scaling_page, teacher
from tests.benchmarks.models import random_model

SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (32, 64, 128, 256, 512)
BLOCKS = (2, 4, 8, 16, 32)
VOCABULARIES = (256, 4096, 32768, 151936)
ACTORS = (1, 2, 4)
_PROMPT, _RESPONSE, _ROWS, _BATCHES = 64, 64, 8, 8

Row = dict[str, Any]


def measure(size: str, device: str) -> Iterator[Row]:
    """A row per point: the sweep, what was measured, `x`, and `cost` in milliseconds per response token; that of the
    whole loop with so many rollout actors in seconds per batch."""
    torch.set_num_threads(1)
    rows = []
    for row in (*_sequences(size), *_lengths(size), *_blocks(size), *_vocabularies(size), *_actors()):
        yield row
        rows.append(row)
    scaling_page.SWEEPS.write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, scaling_page.PLOT)
    scaling_page.write()


def _sequences(size: str) -> Iterator[Row]:
    model = random_model(size, "cpu")
    for n in SEQUENCES:
        yield {"sweep": "sequences", "part": "sampler", "x": n, "cost": _sampler_cost(model, n, _RESPONSE)}


def _lengths(size: str) -> Iterator[Row]:
    model = random_model(size, "cpu")
    for n in LENGTHS:
        yield {"sweep": "response length", "part": "sampler", "x": n, "cost": _sampler_cost(model, _ROWS, n)}
        yield {"sweep": "response length", "part": "teacher", "x": n, "cost": _teacher_cost(model, n)}
        yield {"sweep": "response length", "part": "learner", "x": n, "cost": _learner_cost(model, n)}


def _blocks(size: str) -> Iterator[Row]:
    model = random_model(size, "cpu")
    for n in BLOCKS:
        yield {"sweep": "block size", "part": "sampler", "x": n, "cost": _sampler_cost(model, _ROWS, _RESPONSE, n)}
        yield {"sweep": "block size", "part": "learner", "x": n, "cost": _learner_cost(model, _RESPONSE, n)}


def _vocabularies(size: str) -> Iterator[Row]:
    for n in VOCABULARIES:
        model = random_model(size, "cpu", vocab_size=n)
        yield {"sweep": "vocabulary", "part": "sampler", "x": n, "cost": _sampler_cost(model, _ROWS, _RESPONSE)}
        yield {"sweep": "vocabulary", "part": "teacher", "x": n, "cost": _teacher_cost(model, _RESPONSE)}
        yield {"sweep": "vocabulary", "part": "learner", "x": n, "cost": _learner_cost(model, _RESPONSE)}


def _actors() -> Iterator[Row]:
    """The pipeline with more rollout actors on the same cores: what more processes cost."""
    for n in ACTORS:
        # small shares of a core, so that Ray grants the most actors on two
        actors = ["--rollout.actors", str(n), "--rollout.resources.cpus", "0.1"]
        rows = pipeline.run([*actors, "--curriculum.schedule", "constant"], _BATCHES)
        seconds = pipeline.metrics(rows)["seconds_batch"]
        yield {"sweep": "rollout actors", "part": "seconds a batch", "x": n, "cost": seconds}


def _sampler_cost(model: Any, sequences: int, new_tokens: int, block: int = sampler.BLOCK) -> float:
    """One token a step, so that a larger block differs in nothing but its rows and its commits."""
    made = Sampler(
        model, block_size=block, mask_token_id=model.config.vocab_size - 1, eos_token_id=-1, slots=sequences, seed=0
    )
    requests, decoding = sampler._requests(sequences, _PROMPT, new_tokens, block), Decoding(StaticUnmasking(), 1.0)
    return min(1e3 / sampler._speed(made, requests, decoding)["tokens_per_second"] for _ in range(2))


def _teacher_cost(model: Any, response: int) -> float:
    config = TeacherConfig(
        backend="transformers", target="topk", dtype="float32", max_batched_tokens=2048, resources=Resources()
    )
    asked = teacher._requests(_ROWS, _PROMPT, response, model.config.vocab_size)
    backend = teacher.LoadedBackend(model, config)
    seconds, _ = teacher._time(lambda: backend.targets(asked), "cpu")
    return 1e3 * seconds / sum(len(r.ids) - _PROMPT for r in asked)


def _learner_cost(model: Any, response: int, block: int = learner_step.BLOCK) -> float:
    """Forward and backward of one update, targets of the kind `hidden`."""
    model.set_attn_implementation("sdpa")  # the sampler set its own
    trajectories = learner_step.random_trajectories(model.config.hidden_size, _ROWS, _PROMPT, response, False, block)
    meta = TrajectoryMeta(block, model.config.vocab_size - 1, "benchmark", "hidden", model.config.hidden_size)
    head = model.lm_head.weight.detach().clone()
    builder = BatchBuilder(meta, "row_mean", "bucket", 4096, "sdpa", torch.device("cpu"), head)
    seconds = learner_step._time(model, builder, trajectories, learner_step._chunked_loss, False)["seconds"]
    return 1e3 * seconds / sum(len(t.response_ids) for t in trajectories)


def plot(rows: list[Row], path: Path) -> None:
    """One panel per sweep, cost relative to that of its first point, both axes logarithmic, as PNG."""
    from matplotlib.figure import Figure  # slow to import, and not needed without a plot

    sweeps = {name: list(members) for name, members in groupby(rows, key=lambda row: row["sweep"])}
    figure = Figure(figsize=(3 * len(sweeps), 3.2), dpi=120, layout="constrained")
    for axes, (name, members) in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps.items(), strict=True):
        for part in dict.fromkeys(row["part"] for row in members):
            points = [(row["x"], row["cost"]) for row in members if row["part"] == part]
            colour = {"sampler": "C0", "teacher": "C1", "learner": "C2"}.get(part, "C3")
            axes.plot(*zip(*((x, y / points[0][1]) for x, y in points), strict=True), "o-", label=part, color=colour)
        axes.set(xscale="log", yscale="log", xlabel=name)
        axes.set_xticks(
            sorted({row["x"] for row in members}), [f"{x:,}" for x in sorted({row["x"] for row in members})]
        )
        low, high = min(axes.get_ylim()[0], 0.5), max(axes.get_ylim()[1], 2)  # so that small differences look small
        axes.set_ylim(low, high)
        ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= t <= high]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.tick_params(axis="x", labelrotation=45)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.supylabel("cost, first point = 1", fontsize=9)
    figure.savefig(path)
