"""`opdlm train`: start or continue a run, or with --dry-run show what it would do."""

from __future__ import annotations

import shlex
from typing import Annotated, Literal

import typer

from common.config.errors import ConfigError
from common.config.file import load_config, preset_names
from deploy.commands.config_argument import TAKES_OVERRIDES, Config
from deploy.commands.console import console, say
from deploy.named_files import check_writable


def register(app: typer.Typer) -> None:
    app.command(**TAKES_OVERRIDES, epilog=f"Presets: {', '.join(preset_names())}.")(train)


def train(
    context: typer.Context,
    config: Config,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show config, placement and estimates, but start nothing")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="remove an earlier run of the same name first, and nothing else")
    ] = False,
    resume: Annotated[
        Literal["auto"] | None,
        typer.Option(help="auto: continue from the run's newest checkpoint, or start if there is none"),
    ] = None,
    accept_changed_data: Annotated[
        bool,
        typer.Option("--accept-changed-data", help="with --resume: allow that prompts, responses or models changed"),
    ] = False,
) -> None:
    """Train a block-diffusion student.

    [bold]Examples[/bold]

        opdlm train tiny
        opdlm train tiny --name mine --learner.lr 5e-4 --teacher.backend transformers
        opdlm train my.yaml --rollout.unmasking.rule static --rollout.unmasking.steps_per_block 2
        opdlm train qwen3-4b --dry-run

    [bold]Overrides[/bold]

    Every field of the config can be overridden as --FIELD VALUE or --FIELD=VALUE. Text is taken as typed; other values
    are read as YAML. In paths, `~` and `$NAME` are expanded; a relative path starts at the current folder.
    [bold]opdlm fields[/bold] lists all fields. The most used:

        --name, --output_dir           the run's folder is output_dir/name
        --model.path                   the autoregressive model to start from
        --data.prompts                 JSON, JSONL or Parquet with a question per row
        --pipeline.max_batches         stop after this many rollout batches
        --rollout.actors               rollout processes; likewise teacher.actors and learner.ranks
        --rollout.prompts_per_batch    prompts per rollout batch
        --learner.lr                   learning rate
        --teacher.backend              vllm, transformers or self
        --teacher.target               hidden (full vocabulary) or topk
        --curriculum.max_tokens        length limit of responses, tokens
        --evaluation.problems          held-out problems with answers; null: no evaluation
    """
    settings = load_config(config, context.args)
    if dry_run:
        from deploy.commands.dry_run import show

        show(settings, console)
        return
    from deploy.monitoring.progress import summary_table
    from deploy.pipeline import run

    if overwrite and resume:
        raise ConfigError("--overwrite and --resume cannot be combined; give one of them")
    if accept_changed_data and not resume:
        raise ConfigError("--accept-changed-data has no effect on a new run; add --resume auto")
    check_writable("output_dir", settings.run_dir)
    if settings.cache_dir:
        check_writable("cache_dir", settings.cache_dir)
    summary = run(settings, overwrite, resume == "auto", accept_changed_data)
    if "student" in summary:
        console.print(summary_table(summary))
    if "held_out_kl" in summary:
        before, after = (summary[name]["mean"] for name in ("held_out_kl_init", "held_out_kl"))
        say(f"held-out KL: {before:.4f} nats/token before the training, {after:.4f} after it")
    final = shlex.quote(f"{settings.run_dir}/checkpoints/final")
    say(f"everything is in {settings.run_dir}; try: opdlm generate {final}")
