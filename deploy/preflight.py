"""Everything that can be checked before a process starts. Each error names the field, the value and the remedy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.config_file import ConfigError
from common.prompts import Prompt, PromptError, PromptSet, load_prompts
from deploy.placement import check_resources, plan


def looks_local(path: str) -> bool:
    """Whether a model path means a folder and not a hub id (`organisation/name`)."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()


def check_model_folder(field: str, path: str) -> None:
    """Refuse a folder that is missing or holds no causal LM.

    Raises:
        ConfigError: names the field, the path and the remedy.
    """
    folder = Path(path)
    if not folder.is_dir():
        if looks_local(path):
            raise ConfigError(f"{field}: folder {path!r} does not exist; give a Hugging Face model folder or a hub id")
        return
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{field}: {path!r} has no config.json; give the folder of a Hugging Face causal LM")
    architectures = json.loads(file.read_text()).get("architectures") or []
    if not any(name.endswith("ForCausalLM") for name in architectures):
        raise ConfigError(
            f"{field}: {path!r} is {architectures or 'of no stated architecture'}, not a causal LM "
            "(an architecture that ends in ForCausalLM); choose another model"
        )
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(f"{field}: {path!r} holds no .safetensors file; save the model with save_pretrained")


def check(config: RunConfig) -> tuple[PromptSet, list[Prompt]]:
    """All checks of a run; returns its prompts and held-out problems, so that nothing is read twice.

    Raises:
        ConfigError: the run cannot start as configured.
    """
    check_model_folder("model.path", config.model.path)
    check_model_folder("teacher.path", config.teacher_path)
    if config.ray.address is None:
        check_resources(plan(config), config.ray.num_cpus or os.cpu_count() or 1, _local_gpus())
    if (config.run_dir / "summary.json").exists():
        raise ConfigError(
            f"name: {str(config.run_dir)!r} already holds a finished run; choose another --name, or add --overwrite"
        )

    from transformers import AutoConfig

    from common.student import convert, load_tokenizer, tokenizer_fingerprint

    try:
        model_config, tokenizer = convert(config.model.path, config.block_size, config.model.mask_token)
    except (ValueError, OSError) as error:
        raise ConfigError(f"model.path {config.model.path!r}: {error}") from error
    if config.teacher.path and tokenizer_fingerprint(load_tokenizer(config.teacher.path)) != tokenizer_fingerprint(
        tokenizer
    ):
        raise ConfigError(
            f"teacher.path {config.teacher.path!r} and model.path {config.model.path!r} have different tokenizers; "
            "token ids must mean the same to both: choose models of one family"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.path {config.model.path!r}: the tokenizer has no end token; set eos_token in it")
    prompts, problems = read_prompts(config, tokenizer)
    _check_lengths(
        config,
        prompts,
        problems,
        min(model_config.max_position_embeddings, _teacher_length(config, AutoConfig)),
    )
    return prompts, problems


def read_prompts(config: RunConfig, tokenizer: Any) -> tuple[PromptSet, list[Prompt]]:
    """The run's prompts, and its held-out problems in the order of their file."""
    try:
        prompts = load_prompts(config.data, tokenizer, config.seed)
        if not config.evaluation.problems:
            return prompts, []
        data = config.data.model_copy(update={"prompts": config.evaluation.problems, "epochs": 1, "limit": None})
        problems = load_prompts(data, tokenizer, seed=None).prompts[: config.evaluation.count]
    except PromptError as error:
        raise ConfigError(str(error)) from error
    without = [p.question for p in problems if p.answer is None]
    if without:
        raise ConfigError(
            f"evaluation.problems {config.evaluation.problems!r}: {len(without)} problems have no "
            f"{config.data.answer_field!r}, the first is {without[0]!r}; set data.answer_field"
        )
    return prompts, problems


def _check_lengths(config: RunConfig, prompts: PromptSet, problems: list[Prompt], limit: int) -> None:
    longest = max(len(p.ids) for p in prompts.prompts + problems)
    response = max(config.curriculum.max_tokens, config.evaluation.max_new_tokens if problems else 0)
    needed = longest + response + config.block_size
    if needed > limit:
        raise ConfigError(
            f"the longest prompt ({longest} tokens) and response ({response}) need {needed} positions, the model has "
            f"{limit}; lower data.max_prompt_tokens, curriculum.max_tokens or evaluation.max_new_tokens"
        )


def _teacher_length(config: RunConfig, auto_config: Any) -> int:
    return int(auto_config.from_pretrained(config.teacher_path).max_position_embeddings)


def _local_gpus() -> int:
    import torch

    return torch.cuda.device_count()
