"""The command line: `opdlm train | eval | generate | lm_eval | respond | ablate | convert | dashboard | ...`.

Heavy libraries are imported inside the commands, so that `--help` and `--dry-run` answer at once.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from common.config.file import ConfigError, load_config, preset_names
from deploy.commands import ablate as ablate_command
from deploy.commands import eval as eval_command
from deploy.commands import generate as generate_command
from deploy.commands import jobs as job_commands
from deploy.commands import respond as respond_command
from deploy.commands.dashboard import dashboard
from deploy.errors import RunError, Stopped
from deploy.evaluation.decoding_options import DtypeName

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn an autoregressive LM into a block-diffusion LM by on-policy distillation (OPDLM).",
    epilog="Begin with [bold]opdlm train tiny[/bold]: the whole loop on this machine, no GPU needed.",
)
console = Console()


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[OPTIONS] [--FIELD VALUE]...",
    epilog=f"Presets: {', '.join(preset_names())}.",
)
def train(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a preset", metavar="CONFIG")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show config, placement and estimates; start nothing")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier run of the same name")] = False,
    resume: Annotated[
        Literal["auto"] | None,
        typer.Option(help="auto: go on from the run's newest checkpoint; start it where there is none"),
    ] = None,
) -> None:
    """Train a block-diffusion student.

    [bold]Examples[/bold]

        opdlm train tiny
        opdlm train tiny --name mine --learner.lr 5e-4 --teacher.backend transformers
        opdlm train my.yaml --rollout.unmasking.rule static --rollout.unmasking.steps_per_block 2
        opdlm train qwen3-4b --dry-run

    [bold]Overrides[/bold]

    Every field of the config can be overridden as --FIELD VALUE or --FIELD=VALUE; values are YAML.
    [bold]opdlm fields[/bold] lists them all. The most used:

        --name, --output_dir           the run's folder is output_dir/name
        --model.path                   the autoregressive model to start from
        --data.prompts                 JSON, JSONL or Parquet with a question per row
        --pipeline.max_batches         stop after so many rollout batches
        --rollout.actors               rollout processes; also teacher.actors and learner.ranks
        --rollout.prompts_per_batch    prompts per rollout batch
        --learner.lr                   learning rate
        --teacher.backend              vllm or transformers
        --teacher.target               hidden (full vocabulary) or topk
        --curriculum.max_tokens        longest response
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
        raise ConfigError("--overwrite and --resume exclude each other; give one of them")
    summary = run(settings, overwrite, resume == "auto")
    if "student" in summary:
        console.print(summary_table(summary))
    console.print(
        f"everything is in {settings.run_dir}; try: opdlm generate {settings.run_dir}/checkpoints/final",
        soft_wrap=True,
        highlight=False,
    )


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="folder or hub id of an autoregressive LM", metavar="MODEL")],
    out: Annotated[Path, typer.Argument(help="folder to write", metavar="OUT")],
    block_size: Annotated[int, typer.Option(min=1, help="tokens per block")] = 4,
    mask_token: Annotated[str, typer.Option(help="added where the tokenizer has no mask token")] = "<|mask|>",
    dtype: DtypeName = "bfloat16",
) -> None:
    """Write the untrained student of an ARLM: same weights, a mask token, its block size in the config.

    [bold]Example[/bold]

        opdlm convert deploy/models/tiny-arlm student --block-size 4
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"OUT: {str(out)!r} exists; choose another folder, or remove it")
    from deploy.model_checks import check_model_folder

    check_model_folder("MODEL", model)
    import torch

    from common.student import convert_folder

    convert_folder(model, out, block_size, mask_token, getattr(torch, dtype))
    console.print(f"wrote {out}; it is untrained: opdlm train does that", soft_wrap=True, highlight=False)


@app.command("make-tiny-arlm")
def make_tiny(
    out: Annotated[Path, typer.Option(help="folder to write")] = Path("tiny-arlm"),
    seed: Annotated[int, typer.Option(min=0, help="of weights and problems")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="optimiser updates; default: as the shipped model")] = None,
    threads: Annotated[int, typer.Option(min=1, help="compute threads")] = 1,
) -> None:
    """Train the demo's tiny autoregressive model from scratch, about ten minutes on one core.

    [bold]Example[/bold]

        opdlm make-tiny-arlm --out my-arlm --seed 1
    """
    from deploy.demo.tiny_arlm import make_tiny_arlm

    options: dict[str, Any] = {} if steps is None else {"steps": steps}
    metrics = make_tiny_arlm(out, seed=seed, threads=threads, **options)
    for name, value in metrics.items():
        console.print(f"{name:>16}  {value}", highlight=False)
    console.print(f"wrote {out}", soft_wrap=True, highlight=False)


@app.command()
def fields() -> None:
    """List every field of the config with its type, default and meaning."""
    from deploy.commands.fields import field_table

    console.print(field_table())


app.command("eval")(eval_command.evaluate)
app.command()(generate_command.generate)


@app.command(
    "lm_eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    options_metavar="[OPTIONS OF lm_eval]",
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with the model `opdlm`; all options are those of lm_eval.

    [bold]Example[/bold]

        opdlm lm_eval --model opdlm --model_args pretrained=runs/mine/checkpoints/final --tasks gsm8k
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("lm_eval: lm-evaluation-harness is not installed; install opdlm[eval]")
    from deploy.evaluation import lm_eval_model as harness

    harness.main(context.args)


job_commands.register(app)
app.command()(dashboard)
app.command()(ablate_command.ablate)
respond_command.register(app)


def main() -> None:
    """Run the command line; bad input ends with status 2 and no traceback, a failed run with status 1."""
    # progress bars of single files say nothing here; a user's own setting wins
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(prog_name="opdlm")
    except ConfigError as error:
        _report("error: ", error)
        sys.exit(2)
    except Stopped as stopped:
        _report("stopped: ", stopped)
        sys.exit(stopped.exit_status)
    except RunError as error:
        _report("run failed: ", error)
        sys.exit(1)


def _report(label: str, error: Exception) -> None:
    text = Text.assemble((label, "bold red"), str(error))
    Console(stderr=True).print(text, soft_wrap=True)


if __name__ == "__main__":
    main()
