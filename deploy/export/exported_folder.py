"""Exported folders: a student as other programs load it, with the code that they need for that.

    hf      transformers, with trust_remote_code: `generate` decodes by block diffusion (block_diffusion.py)
    sdar    SGLang, LMDeploy and JetEngine, which know this architecture; transformers as well
    peft    an adapter alone, for PEFT

A checkpoint keeps the `model_type` of its family, so that it is read like any model of the family. An exported folder
has one of its own, so that what does not know it refuses it, in place of decoding it autoregressively. `opdlm` reads
both: `base_model_type` in the config names the family (common/student.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from common.adapter_files import read_adapter
from common.conversion import end_tokens_of
from common.model_files import ModelError, read_json, share_weights
from common.student import attention_context, check_family, load_config, load_model, load_tokenizer
from common.vocabulary import token_count
from deploy.export import block_diffusion
from deploy.export.run_record import RunRecord, run_record
from deploy.versions import installed_versions

Format = Literal["hf", "sdar", "peft"]
CODE = Path(block_diffusion.__file__)


@dataclass(frozen=True)
class Student:
    """A student's folder, as far as an export needs it."""

    folder: Path
    values: dict[str, Any]  # of config.json
    config: Any  # transformers'
    tokenizer: PreTrainedTokenizerBase
    end_tokens: tuple[int, ...]
    run: RunRecord | None  # that made it, where that is known
    base: str | None  # the name of the model that it was made of, where that is known

    @property
    def origin(self) -> str:
        of = f" of {self.base}" if self.base else ""
        return f"student{of}, made by opdlm {installed_versions()['opdlm']}"

    def described(self) -> dict[str, Any]:
        """The fields of an exported config.json that say how to decode it."""
        return {
            "base_model_type": self.config.model_type,
            "mask_token_id": self.config.mask_token_id,
            "block_size": self.config.block_size,
            "attention_context": attention_context(self.config),
            "end_token_ids": list(self.end_tokens),
            "token_count": token_count(self.tokenizer),
            "origin": self.origin,
        }


def read_student(folder: Path, base: str | None = None) -> Student:
    """The student in a local folder that `check_student_folder` accepts; `base` is the model that it was made of, in
    place of what its run says.

    Raises:
        ModelError: its config or tokenizer cannot be read, its family is not supported, or it is a gated adapter.
        ConfigError: the config of its run cannot be read.
    """
    adapter = read_adapter(str(folder))
    if adapter and adapter.config.gated:
        raise ModelError(
            "is an adapter with a gate, which other programs do not have; serve it with opdlm serve, or train without "
            "adapter.gate"
        )
    config = load_config(str(folder))
    check_family(config)
    tokenizer = load_tokenizer(str(folder))
    ends = end_tokens_of(str(folder), config, tokenizer)
    run = run_record(folder)
    base = base or (run.base if run else None)
    return Student(folder, read_json(folder / "config.json"), config, tokenizer, ends, run, base)


Writer = Callable[[Student, Path], None]  # what a format has beside the tokenizer and the generation config


def write_exported(student: Student, out: Path, write: Writer) -> None:
    """Write the whole folder, or nothing."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(student, partial)
        shutil.copy(CODE, partial / CODE.name)
        student.tokenizer.save_pretrained(partial)
        ends = list(student.end_tokens)
        padding = student.tokenizer.pad_token_id
        GenerationConfig(eos_token_id=ends, pad_token_id=ends[0] if padding is None else padding).save_pretrained(
            partial
        )
        share_weights(partial)
        if out.is_dir():
            out.rmdir()  # it is empty
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_config(values: dict[str, Any], out: Path) -> None:
    (out / "config.json").write_text(json.dumps(dict(sorted(values.items())), indent=2) + "\n", encoding="utf-8")


def save_weights(student: Student, out: Path, untied: bool = False) -> None:
    """All parameters, in the dtype of the student's config and under the names that they have in memory; `untied`: with
    an LM head of its own. An adapter is merged."""
    model = load_model(str(student.folder), student.config.dtype or torch.float32, "sdpa")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if untied and head.weight is embedding.weight:
        model.config.tie_word_embeddings = False
        head.weight = nn.Parameter(embedding.weight.detach().clone())
    model.generation_config = GenerationConfig()  # its own is written with the rest
    model.save_pretrained(out, save_original_format=False)
