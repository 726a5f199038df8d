"""The folder of an adapter (common/lora.py): PEFT's files adapter_config.json and adapter_model.safetensors, with
`opdlm_gate` as one more field, beside the student's config.json and tokenizer. The base model lies elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.config.adapter import AdapterConfig
from common.model_files import ModelError, read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
NAMES_BEGIN = "base_model.model."  # in PEFT's files


@dataclass(frozen=True)
class AdapterFolder:
    """What adapter_config.json says: the adapter, and where its base model is."""

    config: AdapterConfig
    base: str
    folder: Path


def read_adapter(path: str, base: str | None = None) -> AdapterFolder | None:
    """The adapter in a folder that a run wrote, of the model at `base` where that is given; None: the folder, file or
    hub id is a whole model, or the adapter is another's, of which whatever loads it says that it lacks its model.

    Raises:
        ModelError: adapter_config.json is damaged; or a `base` is given which is an adapter itself, or for no adapter.
    """
    if base is not None and (Path(base) / ADAPTER_CONFIG).is_file():
        raise ModelError(f"cannot act in {base!r}, which is an adapter itself; give the model of that one")
    file = Path(path) / ADAPTER_CONFIG
    described = read_json(file) if file.is_file() else {}
    if "opdlm_gate" not in described:
        if base is not None:
            raise ModelError("holds no adapter that a run has written; give a checkpoint of a run with adapter.rank")
        return None
    adapter = AdapterConfig(
        rank=described["r"],
        alpha=described["lora_alpha"],
        targets=described["target_modules"],
        gate=described["opdlm_gate"],
    )
    return AdapterFolder(adapter, base or described["base_model_name_or_path"], Path(path))
