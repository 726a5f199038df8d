"""Replay: an update that was left out, made once more in one process, to see which rows are not finite and why.

The ranks' micro-batches are computed one after another, as each rank packed them; so the loss is that of the run, and
the gradient as well, up to the rounding of the sum over ranks.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from common.config.errors import ConfigError, explain
from common.config.run import RunConfig
from common.conversion import own_head, student_of, teacher_heads_of
from common.prompts import part_of
from common.student import attention_windows, default_attention, load_model
from common.trajectory import Trajectory, read_spool
from learner.alignment import LayerAlignment, frozen_base
from learner.batches import BatchBuilder, of_heads
from learner.faults import FACTS, MODEL, RECORDS
from learner.liger import use_liger_kernels
from learner.objective import empty_sums
from learner.records import RecordReader
from learner.training_module import TrainingModule

_FACTS = {"update": int, "ranks": int, "wrong": str, "extra_weights": tuple}


@dataclass(frozen=True)
class Part:
    """Loss (nats) and gradient norm of some rows; `bad` of their `positions` are not finite."""

    loss: float
    grad_norm: float
    positions: int
    bad: int

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm) and not self.bad


@dataclass(frozen=True)
class Replay:
    """What came of an update: `whole` is all of it, `rows` each trajectory as if it were alone, `weights` the names of
    parameters that are not finite."""

    update: int
    wrong: str
    whole: Part
    rows: list[tuple[Trajectory, Part]]
    weights: list[str]


def replay(folder: Path) -> Replay:
    """Repeat the update in a folder of `faults/`.

    Raises:
        ConfigError: the folder does not hold one; names the file and what is wrong.
        ValueError: its record batch is not possible.
    """
    facts, config = read_facts(folder)
    student = student_of(config)
    reader = RecordReader(config, student)
    trajectories, meta = reader.read(read_spool(folder / RECORDS))
    samples = config.rollout.samples_per_prompt
    parts = [
        [t for t in trajectories if part_of(t.sample, samples) == part] for part in range(len(config.objective.parts))
    ]
    on_gpu = bool(config.learner.resources.gpus) and torch.cuda.is_available()
    device, attention = torch.device("cuda" if on_gpu else "cpu"), default_attention() if on_gpu else "sdpa"
    model = load_model(config.model.path, getattr(torch, config.learner.dtype), attention).to(device)
    if config.learner.liger_kernels and on_gpu:
        use_liger_kernels(model)
    module = TrainingModule(model.train(), config)
    if base := frozen_base(config, device):
        module.alignment = LayerAlignment(model, base, config.objective.terms)
    builder = BatchBuilder.of(
        config,
        meta,
        attention=attention,
        device=device,
        windows=attention_windows(student.config),
        **of_heads(teacher_heads_of(config, student, device)),
        **own_head(config, student),
    )
    builders = builder.with_extra(config.objective, facts["extra_weights"])
    return Replay(
        update=facts["update"],
        wrong=facts["wrong"],
        whole=_made(module, builders, parts, facts["ranks"]),
        rows=[(t, _made(module, [b], [[t]], 1)) for part, b in zip(parts, builders, strict=True) for t in part],
        weights=[name for name, p in model.named_parameters() if not torch.isfinite(p).all()],
    )


def read_facts(folder: Path) -> tuple[dict[str, Any], RunConfig]:
    """What a fault's folder says of itself, and the config of its run with the kept student as model.

    Raises:
        ConfigError: a file is missing, or fault.json is not one.
    """
    for name in (FACTS, RECORDS, MODEL):
        if not (folder / name).exists():
            raise ConfigError(f"FILE: {str(folder)!r} has no {name}; give a folder of runs/NAME/faults")
    try:
        facts = dict(json.loads((folder / FACTS).read_text()))
        config = RunConfig(**facts["config"])
        known: dict[str, Any] = {name: kind(facts[name]) for name, kind in _FACTS.items()}
    except ValidationError as error:
        raise ConfigError(f"FILE: {FACTS} holds another config: {explain(error.errors()[0])}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"FILE: {str(folder / FACTS)!r} cannot be read ({error!r}); write it anew or remove it"
        ) from error
    if not 1 <= known["ranks"] <= config.learner.batch_rows:
        raise ConfigError(f"FILE: {FACTS} has ranks {known['ranks']}; it must be 1 to {config.learner.batch_rows}")
    model = config.model.model_copy(update={"path": str(folder / MODEL)})
    # targets of hidden states need the teachers' LM heads, which are where the run found them
    path, *others = config.teacher_paths.values()
    moved = [t.model_copy(update={"path": p}) for t, p in zip(config.teacher.others, others, strict=True)]
    teacher = config.teacher.model_copy(update={"path": path, "others": tuple(moved)})
    return known, config.model_copy(update={"model": model, "teacher": teacher})


def _made(module: nn.Module, builders: list[BatchBuilder], parts: list[list[Trajectory]], ranks: int) -> Part:
    """The trajectories of each loss, packed by its builder."""
    module.zero_grad()
    sums = empty_sums(builders[0].device)
    positions = 0
    for builder, trajectories in zip(builders, parts, strict=True):
        for rank in range(ranks):
            batches, of_all_ranks = builder.update(trajectories, rank, ranks)
            for batch in batches:
                loss: Tensor = module(builder.tensors(batch, trajectories), sums)
                loss.backward()
        positions += of_all_ranks
    norms = [p.grad.float().norm() for p in module.parameters() if p.grad is not None]
    norm = torch.stack(norms).norm().item() if norms else 0.0
    return Part(sums.loss.item(), norm, positions, int(sums.bad.item()))
