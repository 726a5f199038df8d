"""The command line of `opdlm prompts`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from common.config.errors import ConfigError
from common.config.file import overridden, parse_overrides, validated
from common.config.run import RunConfig
from deploy.argument_checks import a_path, finite
from deploy.commands.config_argument import TAKES_OVERRIDES
from deploy.commands.console import console, say
from deploy.evaluation.decoding_options import Temperature

_FIELDS = ("teacher", "seed", "ray", "pipeline")  # what the command reads of a config
_CPU_TOKENS, _MOST_TOKENS = 2**14, 2**20  # of one batch of transformers' generate, padding counted
_CACHE_SHARE = 4  # the KV cache of a batch is one part in so many of a GPU's memory; each step copies it once


def register(app: typer.Typer) -> None:
    app.command(**TAKES_OVERRIDES)(prompts)


def prompts(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="folder or hub id of an instruct model", metavar="MODEL", callback=a_path)
    ],
    output: Annotated[Path, typer.Option(help="Parquet file to write", callback=a_path)],
    count: Annotated[int, typer.Option(min=1, max=10**7, help="prompts to write")] = 20000,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longer user turns are dropped")] = 256,
    min_tokens: Annotated[int, typer.Option(min=1, help="shorter user turns are dropped")] = 4,
    temperature: Temperature = 1.0,
    top_p: Annotated[
        float, typer.Option(min=1e-6, max=1, help="sample from the smallest set of this mass", callback=finite)
    ] = 0.95,
) -> None:
    """Let an instruct model write prompts itself, so that it can be converted without a data set.

    It continues its own chat template from where the user's words begin. Turns that are cut off, too short, damaged or
    like an earlier one are dropped and counted. An interrupted command goes on where it stood when it is repeated.
    --teacher.FIELD, --ray.FIELD and --seed set the engine as in a config; all GPUs of the machine are used.

    [bold]Examples[/bold]

        opdlm prompts models/smollm2-135m --count 20000 --output prompts.parquet

        opdlm prompts models/qwen3-4b --output prompts.parquet --teacher.backend vllm
    """
    if temperature == 0:
        raise ConfigError("--temperature: 0 would write one and the same user turn each time; give more, such as 1")
    settings = _config(model, str(output), context.args)
    from deploy.part_files import PartFiles
    from deploy.user_turns import write_prompts

    written = write_prompts(
        settings,
        PartFiles(output),
        count=count,
        max_new_tokens=max_new_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_p=top_p,
        note=lambda text: console.print(text, style="dim"),
    )
    for reason, number in written.dropped.most_common():
        say(f"{number:>8,} of {written.samples:,} samples dropped: {reason}")
    say(f"wrote {output}: {len(written.prompts):,} prompts")
    if not written.enough:
        say(f"these are fewer than the {count:,} of --count: the model repeats itself, or runs into --max-new-tokens")


def _config(model: str, output: str, overrides: list[str]) -> RunConfig:
    """A config with this engine: every GPU of this machine, or all its cores."""
    for path, _ in parse_overrides(overrides):
        if path[0] not in _FIELDS:
            raise ConfigError(
                f"--{'.'.join(path)}: has no meaning here; prompts takes {', '.join(f'--{f}...' for f in _FIELDS)}"
            )
    import torch

    gpus, cores = torch.cuda.device_count(), torch.get_num_threads()  # cores that this process may use
    teacher: dict[str, Any] = {
        "backend": "transformers",
        "actors": max(1, gpus),
        "dtype": "bfloat16" if gpus else "float32",
        "max_batched_tokens": _gpu_tokens(model) if gpus else _CPU_TOKENS,
        "resources": {"gpus": 1, "threads": 2} if gpus else {"threads": cores},
    }
    raw = {"model": {"path": model}, "data": {"prompts": output}, "teacher": teacher}
    return validated(RunConfig, overridden(raw, overrides))


def _gpu_tokens(model: str) -> int:
    """Tokens whose KV cache in bfloat16 takes its share of a GPU: a step of many sequences takes as long as one of a
    few."""
    import torch

    from common.student import head_width, load_config
    from deploy.model_checks import check_model_folder, model_errors

    check_model_folder("MODEL", model)
    with model_errors("MODEL", model):
        config = load_config(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    token_bytes = 2 * 2 * config.num_hidden_layers * heads * head_width(config)
    memory = torch.cuda.get_device_properties(0).total_memory
    return max(_CPU_TOKENS, min(_MOST_TOKENS, memory // _CACHE_SHARE // token_bytes))
