"""Whether an adapter fits its base model, seen from their files before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from common.adapter_files import ADAPTER_WEIGHTS, NAMES_BEGIN, AdapterFolder
from common.gguf_files import model_folder
from common.model_files import ModelError, read_json, stored_tensors, tensors_in

_SAME = ("model_type", "mask_token_id", "block_size")  # where both configs have them


def check_fits(adapter: AdapterFolder) -> None:
    """Refuse an adapter that cannot act in its base, a local folder.

    Raises:
        ModelError: names what differs, and both values.
    """
    base = Path(model_folder(adapter.base))
    own, others = read_json(adapter.folder / "config.json"), read_json(base / "config.json")
    for name in _SAME:
        if own.get(name, others.get(name)) != others.get(name, own.get(name)):
            raise _misfit(adapter, f"{name} is {own[name]!r} here and {others[name]!r} there")
    if own["vocab_size"] < others["vocab_size"]:
        raise _misfit(adapter, f"vocab_size is {own['vocab_size']} here and {others['vocab_size']} there")
    file = adapter.folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise ModelError(f"has no {ADAPTER_WEIGHTS}; bring it back")
    stored = {name.removeprefix(NAMES_BEGIN): tensor.shape for name, tensor in tensors_in(file).items()}
    found = {name.removesuffix(".weight"): shape for name, shape in stored.items()}
    weights = {name.removesuffix(".weight"): tensor.shape for name, tensor in stored_tensors(base).items()}
    weights = {name if name.startswith("model.") else f"model.{name}": shape for name, shape in weights.items()}
    targets = {name for name in weights if name.rpartition(".")[2] in adapter.config.targets}
    adapted = {name.rpartition(".")[0] for name in found}
    if missing := sorted(adapted - targets):
        raise _misfit(adapter, f"{missing[0]} is adapted here, and no layer that adapts there")
    if missing := sorted(targets - adapted):
        raise _misfit(adapter, f"{missing[0]} is there, and not adapted here")
    rank = adapter.config.rank
    for name in sorted(targets):
        rows, columns = weights[name]
        a, b = found.get(f"{name}.lora_A"), found.get(f"{name}.lora_B")
        if a is None or b is None:
            raise ModelError(f"has only one of lora_A and lora_B of {name}; bring {ADAPTER_WEIGHTS} back")
        if (a[1], b[0]) != (columns, rows):
            raise _misfit(adapter, f"{name} is {b[0]} x {a[1]} by A and B here, and {rows} x {columns} there")
        if (a[0], b[1]) != (rank, rank):
            raise ModelError(
                f"has A and B of rank {a[0]} and {b[1]} at {name}, and r is {rank} in adapter_config.json; bring the "
                "file back that is not of this adapter"
            )


def _misfit(adapter: AdapterFolder, why: str) -> ModelError:
    return ModelError(f"does not fit {adapter.base!r}: {why}; give the model that it was trained on")
