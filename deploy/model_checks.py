"""What is checked of models before a process starts. Each error names the field, the value and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.config.errors import ConfigError
from common.config.run import RunConfig


def check_model_folder(field: str, path: str) -> None:
    """Refuse a folder that is missing or holds no causal LM; a hub id passes.

    Raises:
        ConfigError: names the field, the path and the remedy.
    """
    folder = Path(path)
    if not folder.is_dir():
        if looks_local(path):
            raise ConfigError(f"{field}: folder {path!r} does not exist; give a Hugging Face model folder or a hub id")
        return
    architectures = model_json(field, path).get("architectures") or []
    if not any(name.endswith("ForCausalLM") for name in architectures):
        raise ConfigError(
            f"{field}: {path!r} is {', '.join(architectures) or 'of no stated architecture'}, not a causal LM "
            "(an architecture that ends in ForCausalLM); choose another model"
        )
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(f"{field}: {path!r} holds no .safetensors file; save the model with save_pretrained")


def check_student_folder(path: str) -> None:
    """Refuse a MODEL that is no converted student: it would not know its mask token and block size."""
    check_model_folder("MODEL", path)
    if Path(path).is_dir() and model_json("MODEL", path).get("mask_token_id") is None:
        raise ConfigError(
            f"MODEL: {path!r} is an autoregressive model, not a student; convert it first with opdlm convert {path} OUT"
        )


def model_json(field: str, path: str) -> dict[str, Any]:
    """The config.json of a model folder."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ConfigError(f"{field}: {path!r} has no config.json; give the folder of a Hugging Face causal LM")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ConfigError(f"{field}: {str(file)!r} is not a JSON object ({error}); save the model again") from error


def looks_local(path: str) -> bool:
    """Whether a model path means a folder and not a hub id (`organisation/name`)."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()


def check_models(config: RunConfig) -> tuple[Any, int]:
    """The student's tokenizer, and the number of positions that both models can read."""
    from transformers import AutoConfig

    from common.student import check_family, convert, load_tokenizer, tokenizer_fingerprint

    try:
        model_config, tokenizer = convert(config.model.path, config.block_size, config.model.mask_token)
        teacher_config = AutoConfig.from_pretrained(config.teacher_path)
        teacher_tokenizer = load_tokenizer(config.teacher_path)
    except (ValueError, OSError) as error:
        raise ConfigError(f"model.path {config.model.path!r}, teacher.path {config.teacher_path!r}: {error}") from error
    if config.target_kind == "hidden":  # the LM head is applied here; other targets come from the engine
        try:
            check_family(teacher_config)
        except ValueError as error:
            raise ConfigError(f"teacher.path {config.teacher_path!r}: {error}") from error
    if tokenizer_fingerprint(teacher_tokenizer) != tokenizer_fingerprint(tokenizer):
        raise ConfigError(
            f"teacher.path {config.teacher_path!r} and model.path {config.model.path!r} have different tokenizers; "
            "token ids must mean the same to both: choose models of one family"
        )
    for what, value in (("end token", tokenizer.eos_token_id), ("chat template", tokenizer.chat_template)):
        if value is None:
            raise ConfigError(f"model.path {config.model.path!r}: the tokenizer has no {what}; add it to its files")
    return tokenizer, min(model_config.max_position_embeddings, teacher_config.max_position_embeddings)
