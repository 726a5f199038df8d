"""`opdlm train --dry-run`: the resolved config, the placement of every process, memory and payload estimates."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from common.config.errors import ConfigError
from common.config.run import RunConfig
from common.config.yaml_loader import written
from common.datasets.errors import PromptError
from common.datasets.rows import open_rows
from deploy.model_checks import check_model_folder
from deploy.placement import (
    Placement,
    disk_bytes,
    host_copy_bytes,
    learner_copy_bytes,
    object_store_mib,
    on_cluster,
    plan,
    trained_parameters,
)
from learner.schedule import count_updates


def show(config: RunConfig, console: Console) -> None:
    """Print everything, without starting Ray or loading a model. Files that are not on this machine become notes.

    Raises:
        ConfigError: a folder that is here is no causal LM, the model's sizes are unknown, or a prompt file is broken.
    """
    for field, path in {"model.path": config.model.path, **config.teacher_paths}.items():
        if Path(path).exists():
            check_model_folder(field, path)
    placement = plan(config)
    notes = _notes(config, placement)
    resolved = written(config.model_dump(mode="json"))
    console.rule("config")
    console.print(Syntax(resolved, "yaml", background_color="default"))
    console.rule("placement")
    console.print(_placement_table(placement))
    console.print(f"together: {placement.cpus:g} CPUs, {placement.gpus:g} GPUs; memory is a rough estimate")
    for line in _teacher_pools(config, placement):
        console.print(line, highlight=False, soft_wrap=True)
    if config.objective.terms.aligns_layers:
        console.print(_alignment_cost(config, placement), highlight=False, soft_wrap=True)
    for line in _later_teaching(config):
        console.print(line, highlight=False, soft_wrap=True)
    console.rule("payload of one rollout batch, at most")
    used = {"trajectories", "weights", f"targets ({config.target_kind})"}
    why = f"teacher.target is {config.target_kind}"
    if config.target_kind == "none":
        why = "the learner's own forward gives them" if config.teaches_itself else "labels are hard"
    for name, nbytes in placement.payload.items():
        style = None if name in used else "dim"
        unused = "" if name in used else f"  not used: {why}"
        console.print(f"{name:>18}  {size(nbytes):>10}{unused}", style=style, highlight=False)
    if not on_cluster(config):
        store = object_store_mib(config, placement)
        console.print(f"{'object store':>18}  {size(store * 2**20):>10}  of the Ray started here", highlight=False)
    if config.recovery.learner_copy:
        copies = f"{size(learner_copy_bytes(placement)):>10}  of host memory, to restart ranks from"
        console.print(f"{'learner copies':>18}  {copies}", highlight=False)
    console.rule("checkpoints")
    for name, nbytes in _checkpoint_bytes(config, placement).items():
        console.print(f"{name:>18}  {size(nbytes):>10}", highlight=False)
    console.rule("run")
    console.print(f"{'parameters':>18}  {placement.shape.parameters:,}", highlight=False)
    if config.adapter.rank:
        trained = trained_parameters(config, placement.shape)
        console.print(f"{'of the adapters':>18}  {trained:,}", highlight=False)
    for name, value in _work(config).items():
        console.print(f"{name:>18}  {value:,}", highlight=False)
    for note in notes:
        console.print(f"[yellow]note:[/yellow] {note}", highlight=False, soft_wrap=True)


def _teacher_pools(config: RunConfig, placement: Placement) -> list[str]:
    """Which processes are of which teacher, where there are several."""
    names: list[list[str]] = [[] for _ in config.teacher_paths]
    for process in placement.processes:
        if process.role == "teacher":
            names[process.pool].append(f"{process.role}-{process.index}")
    if len(names) == 1 or not names[0]:
        return []
    pools = zip(names, config.teacher_paths.values(), config.teacher.pools.values(), strict=True)
    return [f"{len(names)} teacher pools:"] + [
        f"  {', '.join(own)}: {path} for {teacher.prompts_served}" for own, path, teacher in pools
    ]


def _alignment_cost(config: RunConfig, placement: Placement) -> str:
    """What it takes to align all layers at the learner, and what shipping their states would take."""
    base, states = placement.teacher_shapes[0], placement.payload["targets (hidden)"]
    layers = len(config.objective.terms.aligned(base.layers + 1))
    frozen = next(p.memory["frozen ARLM"] for p in placement.processes if p.role == "learner")
    return (
        f"alignment of {layers} layers: a frozen ARLM of {size(frozen)} in each learner rank, and its forward over "
        f"prompts and responses; shipping the states would take {size(layers * states)} a rollout batch"
    )


def _later_teaching(config: RunConfig) -> list[str]:
    """What the teachers read beyond the trajectories, and who takes their place."""
    lines = []
    shape = config.objective.teacher_shape
    if config.target_kind == "topk" and shape.block_aware:
        branches = shape.routed_share * config.teacher.top_k
        more = " and ".join(f"{branches * (b - 1) / 2:g} at block size {b}" for b in config.block_sizes)
        lines.append(f"block-aware targets: for each trained token a teacher reads so many more: {more}")
        if any(teacher.backend == "vllm" for teacher in config.teacher.pools.values()):
            prompts = " and ".join(f"{branches * (1 - 1 / b):g} at block size {b}" for b in config.block_sizes)
            lines.append(
                f"block-aware targets: for vLLM a branch is a prompt of its own, and a trained token has {prompts}"
            )
    if config.block_growth.anchor:
        sizes = ", then ".join(f"{a} teaches blocks of {b}" for a, b in pairwise(config.block_sizes))
        lines.append(f"stage anchors: the student of block size {sizes}, in the place of the teacher")
    return lines


def _checkpoint_bytes(config: RunConfig, placement: Placement) -> dict[str, int]:
    one = sum(placement.checkpoint.values()) if config.pipeline.checkpoints_while_training else 0
    return {
        "one, to resume": one,
        "final model": placement.checkpoint["model"],
        "on the disk": disk_bytes(config, placement),
        "copied in a rank": host_copy_bytes(config, placement.shape),
    }


def size(nbytes: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"


def _placement_table(placement: Placement) -> Table:
    table = Table()
    for column in ("process", "CPUs", "GPUs", "threads", "memory", "of which"):
        table.add_column(column, justify="left" if column in ("process", "of which") else "right")
    for p in placement.processes:
        parts = sorted(p.memory.items(), key=lambda item: -item[1])
        table.add_row(
            f"{p.role}-{p.index}",
            f"{p.cpus:g}",
            f"{p.gpus:g}",
            str(p.threads),
            size(p.total_bytes),
            ", ".join(f"{name} {size(b)}" for name, b in parts[:3] if b),
        )
    return table


def _work(config: RunConfig) -> dict[str, int]:
    """Prompts, rollout batches and updates of the run, where the prompts are here; over-long ones still counted."""
    if not Path(config.data.prompts).exists():
        return {}
    try:
        count = sum(1 for _ in open_rows(config.data.prompts, config.data.split, config.data.subset))
    except PromptError as error:
        raise ConfigError(f"data.prompts: {error}") from error
    held_out = config.evaluation.held_out_prompts
    left = max(count - held_out, 0)
    trained = min(left, config.data.limit or left) * config.data.epochs
    full_batches = -(-trained // config.rollout.prompts_per_batch)
    batches = min(full_batches, config.pipeline.max_batches or full_batches)
    trained = min(trained, batches * config.rollout.prompts_per_batch)
    return {
        "prompts in the file": count,
        **({"prompts held out": held_out} if held_out else {}),
        "prompts to train": trained,
        "rollout batches": batches,
        "updates, at most": count_updates(config, trained).total,
    }


def _notes(config: RunConfig, placement: Placement) -> list[str]:
    places = {
        "model.path": config.model.path,
        **config.teacher_paths,
        "data.prompts": config.data.prompts,
        "data.responses": config.data.responses,
        "data.trajectories": config.data.trajectories,
        "evaluation.problems": config.evaluation.problems,
    }
    missing = [
        f"{field} {path!r} is not on this machine" for field, path in places.items() if path and not Path(path).exists()
    ]
    here = config.ray.num_cpus or os.cpu_count() or 1
    if config.ray.address is None and placement.cpus > here:
        missing.append(f"the run asks for {placement.cpus:g} CPUs, this machine has {here}")
    return missing
