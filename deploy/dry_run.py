"""`opdlm train --dry-run`: the resolved config, the placement of every process, memory and payload estimates."""

from __future__ import annotations

import os
from pathlib import Path

import yaml
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from common.config import RunConfig
from deploy.placement import Placement, plan


def show(config: RunConfig, console: Console) -> None:
    """Print everything; Ray is not started and no model is loaded.

    Raises:
        ConfigError: the model's sizes are unknown.
    """
    placement = plan(config)
    resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    console.rule("config")
    console.print(Syntax(resolved, "yaml", background_color="default"))
    console.rule("placement")
    console.print(_placement_table(placement))
    console.print(f"together: {placement.cpus:g} CPUs, {placement.gpus:g} GPUs; this machine has {os.cpu_count()} CPUs")
    console.rule("estimates")
    for name, nbytes in placement.payload.items():
        console.print(f"{name:>14} per rollout batch, at most  {size(nbytes):>10}", highlight=False)
    console.print(f"{'parameters':>14}  {placement.shape.parameters:,}", highlight=False)
    for note in _missing(config):
        console.print(f"[yellow]note:[/yellow] {note}", highlight=False)


def size(nbytes: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError


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


def _missing(config: RunConfig) -> list[str]:
    places = {
        "model.path": config.model.path,
        "data.prompts": config.data.prompts,
        "evaluation.problems": config.evaluation.problems,
    }
    return [
        f"{field} {path!r} is not on this machine" for field, path in places.items() if path and not Path(path).exists()
    ]
