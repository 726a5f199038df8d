"""The command line: `opdlm train | eval | generate | convert | make-tiny-arlm | fields`.

Heavy libraries are imported inside the commands, so that `--help` and `--dry-run` answer at once.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from common.config import (
    DynamicUnmasking,
    EntropyBoundUnmasking,
    SequentialUnmasking,
    StaticUnmasking,
    Unmasking,
)
from common.config_file import ConfigError, load_config, preset_names
from common.prompts import PromptError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Turn an autoregressive LM into a block-diffusion LM by on-policy distillation (OPDLM).",
)
console = Console()

Rule = Annotated[str, typer.Option(help="unmasking rule: static, dynamic, sequential or entropy_bound")]
Threshold = Annotated[float, typer.Option(help="confidence threshold of the dynamic rule")]
BlockSize = Annotated[int | None, typer.Option(help="tokens per block; default: the model's own")]


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=f"Presets: {', '.join(preset_names())}. `opdlm fields` lists every field that can be overridden.",
)
def train(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a preset", metavar="CONFIG")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show config, placement and estimates; start nothing")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a finished run of the same name")] = False,
) -> None:
    """Train a block-diffusion student.

    Any field of the config can be overridden:

        opdlm train deploy/presets/tiny.yaml
        opdlm train tiny --name mine --learner.lr 5e-4 --teacher.backend transformers
        opdlm train qwen3-4b --dry-run
    """
    settings = load_config(config, context.args)
    if dry_run:
        from deploy.dry_run import show

        show(settings, console)
        return
    if overwrite and settings.run_dir.exists():
        shutil.rmtree(settings.run_dir)
    from deploy.pipeline import run
    from deploy.progress import summary_table

    summary = run(settings)
    console.print(summary_table(summary))
    console.print(
        f"everything is in [bold]{settings.run_dir}[/bold]; try: opdlm generate {settings.run_dir}/checkpoints/final"
    )


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="folder of a trained or converted student")],
    problems: Annotated[Path, typer.Option(help="JSON, JSONL or Parquet with questions and answers")],
    rule: Rule = "dynamic",
    threshold: Threshold = 0.9,
    block_size: BlockSize = None,
    count: Annotated[int, typer.Option(help="first N problems")] = 200,
    max_new_tokens: Annotated[int, typer.Option(help="response length limit, tokens")] = 512,
    slots: Annotated[int, typer.Option(help="sequences decoded at the same time")] = 64,
    autoregressive: Annotated[
        bool, typer.Option("--autoregressive", help="evaluate a causal LM by greedy decoding instead")
    ] = False,
) -> None:
    """Exact match and tokens per step on problems with a checkable answer.

    opdlm eval runs/tiny/checkpoints/final --problems deploy/data/word_problems_heldout.jsonl
    """
    unmasking = unmasking_of(rule, threshold)
    held_out = _problems(model, problems, count)
    from actors.evaluation import evaluate_student, evaluate_teacher

    if autoregressive:
        figures = evaluate_teacher(model, held_out, max_new_tokens=max_new_tokens)
    else:
        figures = evaluate_student(
            model, held_out, unmasking, block_size=block_size, max_new_tokens=max_new_tokens, slots=slots
        )
    for name, value in figures.items():
        console.print(f"{name:>32}  {value:.4g}", highlight=False)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="folder of a trained or converted student")],
    prompt: Annotated[str | None, typer.Argument(help="the prompt; or use --file")] = None,
    file: Annotated[Path | None, typer.Option(help="a file with one prompt a line")] = None,
    rule: Rule = "dynamic",
    threshold: Threshold = 0.9,
    block_size: BlockSize = None,
    max_new_tokens: Annotated[int, typer.Option(help="response length limit, tokens")] = 256,
    temperature: Annotated[float, typer.Option(help="0: greedy")] = 0.0,
    seed: int = 0,
    raw: Annotated[bool, typer.Option("--raw", help="do not apply the chat template")] = False,
) -> None:
    """Answer a prompt by block diffusion.

    opdlm generate runs/tiny/checkpoints/final "Tom has 5 apples, buys 4 more and gives 2 away. How many now?"
    """
    unmasking = unmasking_of(rule, threshold)
    prompts = [prompt] if prompt else [line for line in file.read_text().splitlines() if line] if file else []
    if not prompts:
        raise ConfigError("no prompt: give it as an argument, or a file of prompts with --file")
    check_student(model)
    from actors.evaluation import generate_texts

    results = generate_texts(
        model, prompts, unmasking, block_size=block_size, max_new_tokens=max_new_tokens,
        temperature=temperature, seed=seed, chat=not raw,
    )  # fmt: skip
    for question, (text, trajectory) in zip(prompts, results, strict=True):
        if len(prompts) > 1:
            console.print(f"[dim]{question}[/dim]", highlight=False)
        print(text)
        rate = len(trajectory.response_ids) / trajectory.denoise_forwards
        console.print(
            f"[dim]{len(trajectory.response_ids)} tokens in {trajectory.denoise_forwards} steps, "
            f"{rate:.2f} tokens per step[/dim]",
            highlight=False,
        )


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="folder or hub id of an autoregressive LM")],
    out: Annotated[Path, typer.Argument(help="folder to write")],
    block_size: Annotated[int, typer.Option(help="tokens per block")] = 4,
    mask_token: Annotated[str, typer.Option(help="added where the tokenizer has no mask token")] = "<|mask|>",
) -> None:
    """Write the untrained student of an ARLM: same weights, a mask token, block size in the config.

    opdlm convert deploy/models/tiny-arlm /tmp/student --block-size 4
    """
    from deploy.preflight import check_model_folder

    check_model_folder("MODEL", model)
    import torch

    from common.student import convert_folder

    convert_folder(model, out, block_size, mask_token, torch.bfloat16)
    console.print(f"wrote {out}")


@app.command("make-tiny-arlm")
def make_tiny(
    out: Annotated[Path, typer.Option(help="folder to write")] = Path("tiny-arlm"),
    seed: int = 0,
    steps: Annotated[int | None, typer.Option(help="optimiser updates; default: those of the shipped model")] = None,
) -> None:
    """Train the tiny autoregressive model of the demo from scratch (about ten minutes on one core)."""
    from deploy.tiny_arlm import make_tiny_arlm

    figures = make_tiny_arlm(out, seed=seed) if steps is None else make_tiny_arlm(out, seed=seed, steps=steps)
    for name, value in figures.items():
        console.print(f"{name:>16}  {value}", highlight=False)


@app.command()
def fields() -> None:
    """List every field of the config with its type, default and meaning."""
    from deploy.field_table import field_table

    console.print(field_table())


def unmasking_of(rule: str, threshold: float) -> Unmasking:
    """The unmasking rule of the --rule and --threshold options."""
    rules: dict[str, Any] = {
        "static": StaticUnmasking,
        "sequential": SequentialUnmasking,
        "entropy_bound": EntropyBoundUnmasking,
    }
    if rule == "dynamic":
        if not 0 <= threshold <= 1:
            raise ConfigError(f"--threshold {threshold} is not a probability; give a number from 0 to 1")
        return DynamicUnmasking(threshold=threshold)
    if rule not in rules:
        raise ConfigError(f"--rule {rule!r} is unknown; choose static, dynamic, sequential or entropy_bound")
    return rules[rule]()


def check_student(model: str) -> None:
    from deploy.preflight import check_model_folder

    check_model_folder("MODEL", model)


def _problems(model: str, problems: Path, count: int) -> list[Any]:
    check_student(model)
    from common.config import DataConfig
    from common.prompts import load_prompts
    from common.student import load_tokenizer

    data = DataConfig(prompts=str(problems), max_prompt_tokens=1_000_000)
    loaded = load_prompts(data, load_tokenizer(model), seed=None).prompts[:count]
    if any(p.answer is None for p in loaded):
        raise ConfigError(f"--problems {str(problems)!r}: some rows have no {data.answer_field!r} field")
    return loaded


def main() -> None:
    """Run the command line; user errors end with status 2 and no traceback, failed workers with status 1."""
    from deploy.errors import RunError

    try:
        app()
    except (ConfigError, PromptError) as error:
        Console(stderr=True).print(f"[bold red]error:[/bold red] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except RunError as error:
        Console(stderr=True).print(
            f"[bold red]run failed:[/bold red] {error}", highlight=False, soft_wrap=True, markup=True
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
