"""The command line: `opdlm train | eval | generate | respond | convert | make-tiny-arlm | fields`.

Heavy libraries are imported inside the commands, so that `--help` and `--dry-run` answer at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from common.config import (
    DataConfig,
    DynamicUnmasking,
    EntropyBoundUnmasking,
    SequentialUnmasking,
    StaticUnmasking,
    Unmasking,
)
from common.config_file import ConfigError, load_config, preset_names
from common.prompts import Prompt
from deploy import job_commands, respond_command
from deploy.errors import RunError, Stopped

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

Rule = Annotated[
    Literal["static", "dynamic", "sequential", "entropy_bound"],
    typer.Option(
        metavar="RULE",
        help="which masked tokens a step reveals: static (one, the most confident), sequential (one, the leftmost), "
        "dynamic (all above the threshold) or entropy_bound (the surest within an entropy budget)",
    ),
]
Threshold = Annotated[float, typer.Option(min=0, max=1, help="confidence threshold of the dynamic rule")]
BlockSize = Annotated[int | None, typer.Option(min=1, help="tokens per block; default: the model's own")]
DtypeName = Annotated[Literal["float32", "bfloat16"], typer.Option(help="of weights and activations")]
Student = Annotated[str, typer.Argument(help="folder of a trained or converted student", metavar="MODEL")]


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
        from deploy.dry_run import show

        show(settings, console)
        return
    from deploy.pipeline import run
    from deploy.progress import summary_table

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


@app.command("eval")
def evaluate(
    model: Student,
    problems: Annotated[Path, typer.Option(help="JSON, JSONL or Parquet with a question and an answer per row")],
    rule: Rule = "dynamic",
    threshold: Threshold = 0.9,
    block_size: BlockSize = None,
    count: Annotated[int, typer.Option(min=1, help="first N problems")] = 200,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="response length limit, tokens")] = 512,
    slots: Annotated[int, typer.Option(min=1, help="sequences decoded at the same time")] = 64,
    dtype: DtypeName = "float32",
    autoregressive: Annotated[
        bool, typer.Option("--autoregressive", help="evaluate a causal LM, such as the teacher, by greedy decoding")
    ] = False,
) -> None:
    """Exact match and tokens per step on problems with a checkable answer.

    [bold]Examples[/bold]

        opdlm eval runs/tiny/checkpoints/final --problems deploy/data/word_problems_heldout.jsonl
        opdlm eval runs/tiny/checkpoints/final --problems deploy/data/word_problems_heldout.jsonl --rule static
        opdlm eval deploy/models/tiny-arlm --problems deploy/data/word_problems_heldout.jsonl --autoregressive
    """
    from deploy.preflight import check_model_folder, check_student_folder, read_problems

    if autoregressive:
        check_model_folder("MODEL", model)
    else:
        check_student_folder(model)
    from actors.evaluation import evaluate_student, evaluate_teacher
    from common.student import load_tokenizer

    held_out: list[Prompt] = read_problems(
        "--problems", DataConfig(prompts=str(problems)), load_tokenizer(model), count
    )
    if autoregressive:
        figures = evaluate_teacher(model, held_out, max_new_tokens=max_new_tokens)
    else:
        figures = evaluate_student(
            model,
            held_out,
            unmasking_of(rule, threshold),
            block_size=block_size,
            max_new_tokens=max_new_tokens,
            slots=slots,
            dtype=dtype,
        )
    for name, value in figures.items():
        console.print(f"{name:>32}  {value:.4g}", highlight=False)


@app.command()
def generate(
    model: Student,
    prompt: Annotated[str | None, typer.Argument(help="the prompt; or use --file", metavar="PROMPT")] = None,
    file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="a text file with one prompt a line")
    ] = None,
    rule: Rule = "dynamic",
    threshold: Threshold = 0.9,
    block_size: BlockSize = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="response length limit, tokens")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="of the sampling softmax; 0: greedy")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="of the sampling")] = 0,
    dtype: DtypeName = "float32",
    raw: Annotated[bool, typer.Option("--raw", help="do not apply the chat template")] = False,
) -> None:
    """Answer a prompt by block diffusion.

    [bold]Example[/bold]

        opdlm generate runs/tiny/checkpoints/final "Tom has 5 apples and buys 4 more. How many apples now?"
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file else []
    prompts = [prompt] if prompt else [line for line in lines if line.strip()]
    if not prompts:
        raise ConfigError("no prompt: give it after MODEL, or a file with one prompt a line with --file")
    from deploy.preflight import check_student_folder

    check_student_folder(model)
    from actors.evaluation import generate_texts

    results = generate_texts(
        model,
        prompts,
        unmasking_of(rule, threshold),
        block_size=block_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=not raw,
        dtype=dtype,
    )
    for question, (text, trajectory) in zip(prompts, results, strict=True):
        if len(prompts) > 1:
            console.print(Text(question, style="dim"))
        print(text)
        tokens, steps = len(trajectory.response_ids), trajectory.denoise_forwards
        console.print(Text(f"{tokens} tokens in {steps} steps: {tokens / max(steps, 1):.2f} per step", style="dim"))


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
    from deploy.preflight import check_model_folder

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
    from deploy.tiny_arlm import make_tiny_arlm

    options: dict[str, Any] = {} if steps is None else {"steps": steps}
    figures = make_tiny_arlm(out, seed=seed, threads=threads, **options)
    for name, value in figures.items():
        console.print(f"{name:>16}  {value}", highlight=False)
    console.print(f"wrote {out}", soft_wrap=True, highlight=False)


@app.command()
def fields() -> None:
    """List every field of the config with its type, default and meaning."""
    from deploy.field_table import field_table

    console.print(field_table())


def unmasking_of(rule: str, threshold: float) -> Unmasking:
    """The unmasking rule of the --rule and --threshold options."""
    rules: dict[str, Unmasking] = {
        "static": StaticUnmasking(),
        "dynamic": DynamicUnmasking(threshold=threshold),
        "sequential": SequentialUnmasking(),
        "entropy_bound": EntropyBoundUnmasking(),
    }
    return rules[rule]


job_commands.register(app)
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
