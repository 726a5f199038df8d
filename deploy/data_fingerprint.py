"""What a run read, as one value for each source: by content, so that a file may move and must not change."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xxhash

from common.config.run import RunConfig
from common.prompts import Prompt, PromptSet

_WHOLE_BYTES = 64 * 2**20  # of a larger file only parts are read: hashing 100 GB would take minutes at every start
_PARTS, _PART_BYTES = 32, 2**20


def data_fingerprints(config: RunConfig, prompts: PromptSet) -> dict[str, str]:
    """32 hexadecimal digits by config field, for what the training reads.

    Prompts count with their tokens, in the run's order; a model that is not a folder here counts as its name.
    """
    found = {"data.prompts": of_prompts(prompts.prompts)}
    if prompts.held_out:
        found["evaluation.held_out_prompts"] = of_prompts(prompts.held_out)
    if prompts.responses:
        found["data.responses"] = _of_responses(prompts.responses)
    if prompts.trajectories and config.data.trajectories:
        found["data.trajectories"] = of_files(Path(config.data.trajectories))
    for field, path in {"model.path": config.model.path, **config.teacher_paths}.items():
        found[field] = of_files(Path(path)) if Path(path).exists() else xxhash.xxh3_128_hexdigest(path.encode())
    return found


def of_files(path: Path) -> str:
    """A file, or all files of a folder, hidden ones aside: names, sizes and content."""
    digest = xxhash.xxh3_128()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        name = file.relative_to(path).as_posix()
        if not any(part.startswith(".") for part in Path(name).parts):
            size = file.stat().st_size
            digest.update(f"{name}\0{size}\0".encode())
            with file.open("rb") as opened:
                for start, count in _parts(size):
                    opened.seek(start)
                    digest.update(opened.read(count))
    return digest.hexdigest()


def _parts(size: int) -> Iterable[tuple[int, int]]:
    """(start, bytes) of what is read: all of a file, or its beginning, its end and evenly spaced parts between."""
    if size <= _WHOLE_BYTES:
        return [(0, size)]
    return [(int(start), _PART_BYTES) for start in np.linspace(0, size - _PART_BYTES, _PARTS)]


def of_prompts(prompts: list[Prompt]) -> str:
    """Domains, questions and tokens of the prompts, in their order."""
    digest = xxhash.xxh3_128()
    for prompt in prompts:
        digest.update(f"{prompt.domain}\0{prompt.question}\0{len(prompt.ids)}\0".encode("utf-8", "surrogatepass"))
        digest.update(prompt.ids.tobytes())
    return digest.hexdigest()


def _of_responses(responses: dict[str, list[np.ndarray]]) -> str:
    digest = xxhash.xxh3_128()
    for question in sorted(responses):
        digest.update(f"{question}\0{len(responses[question])}\0".encode("utf-8", "surrogatepass"))
        for ids in responses[question]:
            digest.update(f"{len(ids)}\0".encode())
            digest.update(ids.tobytes())
    return digest.hexdigest()
