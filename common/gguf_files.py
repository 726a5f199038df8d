"""GGUF files as models: each is unpacked once into a Hugging Face folder, which everything else then reads.

The folder lies in the cache of Hugging Face (HF_HOME), under a name that holds the file's place, size and time, so that
a changed file is unpacked again. Config, weights, tokenizer and chat template are what transformers makes of the file;
quantised weights become bfloat16, others stay as they are.

Left out: an engine that computes on the packed blocks. Training changes the weights, so it needs plain ones.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
from pathlib import Path

from common.model_files import ModelError, check_fetched_file

_MAGIC = b"GGUF"
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_DTYPES = {"F32": "float32", "F16": "float16"}  # of files that are not quantised


def gguf_file(path: str) -> Path | None:
    """The GGUF file that a model path means: itself, or the only one of a folder without other weights.

    Raises:
        ModelError: the folder holds several.
    """
    place = Path(path)
    if place.suffix == ".gguf" and place.is_file():
        return place
    if not place.is_dir() or any(place.glob("*.safetensors")):
        return None
    files = sorted(place.glob("*.gguf"))
    if len(files) > 1:
        raise ModelError(f"holds {len(files)} GGUF files ({', '.join(f.name for f in files[:3])}); name one of them")
    return files[0] if files else None


def model_folder(path: str) -> str:
    """The path as it is, or for a GGUF file the folder into which it is unpacked, now if it was not before.

    Raises:
        ModelError: the file is not whole, or of a kind that transformers does not unpack.
    """
    file = gguf_file(path)
    if file is None:
        return path
    check_gguf(file)
    from huggingface_hub.constants import HF_HOME

    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = Path(HF_HOME) / "opdlm" / f"{file.stem}-{key}"
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f".{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of a run start together, and one is enough
            if not (folder / "config.json").is_file():
                _unpack(file, folder)
    return str(folder)


def check_gguf(file: Path) -> None:
    """Refuse what is no whole GGUF model.

    Raises:
        ModelError: says what it is.
    """
    check_fetched_file(file)
    with file.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise ModelError(f"is no GGUF file ({file.name} does not begin with {_MAGIC.decode()}); download it again")
    if _PART.search(file.name):
        raise ModelError(
            f"is one part of a split GGUF model ({file.name}); join the parts with llama-gguf-split --merge"
        )


def _unpack(file: Path, folder: Path) -> None:
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        reader = GGUFReader(file)
        largest = max(reader.tensors, key=lambda tensor: tensor.n_elements)
        dtype = getattr(torch, _DTYPES.get(largest.tensor_type.name, "bfloat16"))
        arguments = {"gguf_file": file.name, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(file.parent, **arguments)
        head_dim = next((f for name, f in reader.fields.items() if name.endswith(".attention.key_length")), None)
        if head_dim:  # transformers takes the family's default for some
            config.head_dim = int(head_dim.contents())
        model, found = AutoModelForCausalLM.from_pretrained(
            file.parent,
            config=config,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **arguments,
        )
        if found["missing_keys"]:  # transformers would leave random weights there
            raise ValueError(
                f"it lacks {min(found['missing_keys'])} and {len(found['missing_keys']) - 1} other tensors"
            )
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(file.parent, **arguments).save_pretrained(scratch)
        scratch.rename(folder)
    except Exception as error:  # the reader, NumPy and transformers raise errors of any class about a damaged file
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of a file or disk: its own words say more
        raise ModelError(
            f"cannot be unpacked by transformers ({' '.join(str(error).split())[:300]}); download it again, or give "
            "the model's Hugging Face folder"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
