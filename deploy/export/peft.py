"""The format `peft`: the adapter alone, in the files of PEFT, which puts it on the base model.

PEFT knows no block diffusion: what it makes of them decodes autoregressively, unless block_diffusion.py is put before
it, as the model card shows.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from common.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFolder, read_adapter
from common.model_files import ModelError, read_json
from common.student import load_config
from deploy.export.exported_folder import Student
from deploy.export.run_record import public_name


def check_peft(student: Student) -> AdapterFolder:
    """The adapter, where PEFT can put it on its base model.

    Raises:
        ModelError: the student is no adapter, or has rows that its base model has not.
    """
    adapter = read_adapter(str(student.folder))
    if adapter is None:
        raise ModelError("is a whole model and no adapter; use --format hf")
    rows = load_config(adapter.base).vocab_size
    if student.config.vocab_size != rows:
        raise ModelError(
            f"has an embedding of {student.config.vocab_size} rows, with one for the mask token, and its base model "
            f"has {rows}, which PEFT leaves as they are; use --format hf, which merges the adapter"
        )
    return adapter


def write_peft(student: Student, out: Path) -> None:
    """The adapter in `out`; its config names the base model without its place on this machine."""
    adapter = check_peft(student)
    described = read_json(student.folder / ADAPTER_CONFIG) | {"base_model_name_or_path": public_name(adapter.base)}
    del described["opdlm_gate"]  # PEFT's own fields alone: there is no gate
    (out / ADAPTER_CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(student.folder / ADAPTER_WEIGHTS, out / ADAPTER_WEIGHTS)
