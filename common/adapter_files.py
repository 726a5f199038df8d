"""The folder of an adapter (common/lora.py): PEFT's files adapter_config.json and adapter_model.safetensors, with
`opdlm_gate` as one more field, beside the student's config.json and tokenizer. The base model lies elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.config.adapter import AdapterConfig
from common.model_files import read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterFolder:
    """What adapter_config.json says: the adapter, and where its base model is."""

    config: AdapterConfig
    base: str
    folder: Path


def read_adapter(path: str) -> AdapterFolder | None:
    """The adapter in a folder that a run wrote; None: the folder, file or hub id is a whole model, or the adapter is
    another's, of which whatever loads it says that it lacks its model.

    Raises:
        ModelError: adapter_config.json is damaged.
    """
    file = Path(path) / ADAPTER_CONFIG
    described = read_json(file) if file.is_file() else {}
    if "opdlm_gate" not in described:
        return None
    adapter = AdapterConfig(
        rank=described["r"],
        alpha=described["lora_alpha"],
        targets=described["target_modules"],
        gate=described["opdlm_gate"],
    )
    return AdapterFolder(adapter, described["base_model_name_or_path"], Path(path))
