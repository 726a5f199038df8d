"""The files of a model's folder: which of them holds each tensor, and whether they are whole.

What counts is what transformers reads: `model.safetensors`, or else the shards that `model.safetensors.index.json`
names. vLLM reads an index first, and without one every .safetensors file, so a folder in which the two would differ is
refused, as is one whose weights are not there, not whole or not plain floats. Only headers are read.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_OTHER_FORMATS = ("*.bin", "*.pth", "*.pt", "*.msgpack", "*.h5", "*.npz")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_LFS = b"version https://git-lfs"
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_HEADS = ("lm_head.weight", "model.embed_tokens.weight")  # tied models may store one of them only
_DEQUANTISE = {
    "bitsandbytes": "dequantise it with model.dequantize() and save_pretrained",
    "compressed-tensors": "dequantise it with CompressedTensorsConfig(dequantize=True) and save_pretrained",
    "fp8": "dequantise it with FineGrainedFP8Config(dequantize=True) and save_pretrained",
    "mxfp4": "dequantise it with Mxfp4Config(dequantize=True) and save_pretrained",
}


class ModelError(ValueError):
    """A model cannot be used as it is; the message says why and what to do, and begins behind its path."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, the bytes [start, end) in it, its dtype as safetensors names it, its shape."""

    file: Path
    start: int
    end: int
    dtype: str
    shape: tuple[int, ...]


def share_weights(folder: Path) -> None:
    """Let whoever may read the folder's config read its weights, which safetensors writes for their owner alone."""
    config = next(folder.glob("*.json"))
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(config, weights)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor that transformers would read, by name.

    Raises:
        ModelError: a file is missing, not whole or in another format, or it is not clear which one counts.
    """
    index = folder / _INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelError(f"has no weight_map of names in {_INDEX}; download the model again")
        return _sharded(folder, weight_map)
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / _SINGLE).is_file():
        raise ModelError(_without_weights(folder, files))
    tensors = tensors_in(folder / _SINGLE)
    for file in files:
        both = [] if file.name == _SINGLE else sorted(tensors.keys() & tensors_in(file).keys())
        if both:
            raise ModelError(
                f"has {both[0]} in {_SINGLE} and in {file.name}, and not every engine reads the same one; remove the "
                "file that is out of date"
            )
    return tensors


def _sharded(folder: Path, weight_map: dict[str, str]) -> dict[str, StoredTensor]:
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if (folder / _SINGLE).is_file() and files != [_SINGLE]:
        raise ModelError(
            f"has {_SINGLE} beside {_INDEX}, which names other files, and not every engine reads the same ones; "
            f"remove {_INDEX if missing else 'what is out of date'}"
        )
    if missing or not files:
        raise ModelError(
            f"lacks {', '.join(missing[:3])} of the {len(files)} files that {_INDEX} names; download the model again"
            if files
            else f"has no weight_map in {_INDEX}; download the model again"
        )
    shards = {name: tensors_in(folder / name) for name in files}
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise ModelError(f"has {name} in {file} by {_INDEX}, but not in the file; download the model again")
    return {name: shards[file][name] for name, file in weight_map.items()}


def _without_weights(folder: Path, files: list[Path]) -> str:
    if any(_SHARD.fullmatch(file.name) for file in files):
        return f"has {files[0].name} but no {_INDEX}; download the model again"
    if files:
        return f"has {files[0].name} but no {_SINGLE}; rename it, or save the model with save_pretrained"
    others = [file.name for pattern in _OTHER_FORMATS for file in sorted(folder.glob(pattern))]
    if (folder / "adapter_config.json").is_file():
        return (
            "is an adapter without its model; merge them: with opdlm merge, or with PEFT's merge_and_unload and "
            "save_pretrained"
        )
    if others:
        return f"holds no .safetensors file but {others[0]}; load it with transformers and save it with save_pretrained"
    return "holds no .safetensors file; save the model with save_pretrained"


def tensors_in(file: Path) -> dict[str, StoredTensor]:
    """The tensors that a safetensors file declares (https://github.com/huggingface/safetensors#format)."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if length <= size else b""
    if len(header) < length or size < 8:
        raise ModelError(f"has {file.name} cut short or damaged ({size:,} bytes); download it again")
    begin = 8 + length
    try:
        tensors = {
            name: StoredTensor(
                file,
                begin + entry["data_offsets"][0],
                begin + entry["data_offsets"][1],
                str(entry["dtype"]),
                tuple(entry["shape"]),
            )
            for name, entry in json.loads(header).items()
            if name != "__metadata__"
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"has {file.name} damaged (its header cannot be read); download it again") from error
    declared = max((tensor.end for tensor in tensors.values()), default=begin)
    if declared != size:
        raise ModelError(
            f"has {file.name} with {size:,} bytes where its header says {declared:,}; it was cut short or damaged: "
            "download it again"
        )
    return tensors


def check_fetched(folder: Path) -> None:
    """Refuse what stands in the place of large files that were not fetched.

    Raises:
        ModelError: a file is a Git LFS pointer, or a link to nothing (a cache that was partly deleted).
    """
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not file.exists():
            raise ModelError(f"has {file.name} as a link to a file that is not there; download the model again")
        if file.is_file():
            check_fetched_file(file)


def check_fetched_file(file: Path) -> None:
    """As `check_fetched`, of one file."""
    with file.open("rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            raise ModelError(f"has {file.name} as a Git LFS pointer; fetch the file itself with git lfs pull")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model's folder.

    Raises:
        ModelError: it holds none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"has {file.name} that is not a JSON object ({error}); save the model again") from error
    if not isinstance(content, dict):
        raise ModelError(f"has {file.name} that is not a JSON object; save the model again")
    return content


def check_unquantised(config: dict[str, Any]) -> None:
    """Refuse a model whose config.json (`config`) says that its weights are quantised.

    Raises:
        ModelError: names the method and how to undo it.
    """
    quantisation = config.get("quantization_config") or config.get("compression_config")
    if quantisation:
        method = str(quantisation.get("quant_method", "unknown"))
        remedy = _DEQUANTISE.get(method, "give the model that it was quantised from")
        raise ModelError(f"is quantised ({method}), and training needs plain weights; {remedy}")


def check_sizes(config: dict[str, Any]) -> None:
    """Refuse a config.json (`config`) in which a size is no positive integer.

    Raises:
        ModelError: names the first.
    """
    for name in _SIZES:
        value = config.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ModelError(f"has {name} {value!r} in config.json where a positive integer belongs; correct it")


def check_rope(config: dict[str, Any]) -> None:
    """Refuse a config.json (`config`) that names two bases of the rotary embedding: transformers 4 and 5, and other
    engines, would take different ones.

    Raises:
        ModelError: names both.
    """
    parameters = config.get("rope_parameters")
    old, new = config.get("rope_theta"), parameters.get("rope_theta") if isinstance(parameters, dict) else None
    if old is not None and new is not None and old != new:
        raise ModelError(
            f"has rope_theta {old} and rope_parameters.rope_theta {new} in config.json, and not every engine takes the "
            "same one; remove the wrong one"
        )


def strays(folder: Path) -> list[str]:
    """Names of .safetensors files beside `model.safetensors` that no index leaves out: vLLM reads them too."""
    if (folder / _INDEX).is_file():
        return []
    return sorted(file.name for file in folder.glob("*.safetensors") if file.name != _SINGLE)


def check_plain(tensors: dict[str, StoredTensor]) -> None:
    """Refuse weights that are stored as anything but floats of 16 bits or more.

    Raises:
        ModelError: names the first.
    """
    packed = sorted(name for name, tensor in tensors.items() if tensor.dtype not in _FLOATS and "weight" in name)
    if packed:
        raise ModelError(
            f"is quantised ({packed[0]} is {tensors[packed[0]].dtype}), and training needs plain weights; give the "
            "model that it was quantised from"
        )


def _same(a: StoredTensor, b: StoredTensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with a.file.open("rb") as left, b.file.open("rb") as right:
        left.seek(a.start)
        right.seek(b.start)
        size = a.end - a.start
        return all(
            left.read(min(2**24, size - done)) == right.read(min(2**24, size - done)) for done in range(0, size, 2**24)
        )


def check_complete(shapes: dict[str, tuple[int, ...]], tensors: dict[str, StoredTensor]) -> None:
    """Refuse weights that are not the model's: transformers would fill in random ones, or choose between two.

    Args:
        shapes: of every parameter of the model, tied ones once.
        tensors: of `stored_tensors`.

    Raises:
        ModelError: a parameter is missing or has another shape (names the first), or the LM head should be the
            embedding and is another.
    """
    head, embedding = (tensors.get(name) for name in _HEADS)
    tied = _HEADS[0] not in shapes
    if tied and head and embedding and not _same(head, embedding):
        raise ModelError(
            f"ties the LM head to the embedding (tie_word_embeddings), but holds another {_HEADS[0]}; set "
            "tie_word_embeddings to false in config.json, or remove that tensor"
        )
    if tied and head and not embedding:
        tensors = {**tensors, _HEADS[1]: head}  # stored under its other name
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise ModelError(
            f"lacks {len(missing)} of the {len(shapes)} tensors that its config.json asks for, the first is "
            f"{missing[0]}; download the model again, or correct config.json"
        )
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ModelError(
                f"has {name} of shape {list(tensors[name].shape)} where its config.json asks for {list(shape)}; "
                "correct config.json"
            )


def head_of(tensors: Iterable[str]) -> str:
    """The name under which the LM head is stored.

    Raises:
        ModelError: it is not there.
    """
    names = set(tensors)
    for name in _HEADS:
        if name in names:
            return name
    raise ModelError(f"holds neither {_HEADS[0]} nor {_HEADS[1]}; give the folder of a causal LM")
