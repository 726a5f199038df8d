"""Checkpoints: complete Hugging Face folders with the state to go on from, written atomically.

    checkpoints/batch-000040/   config.json, tokenizer, model.safetensors   loads like any model folder
                                resume/                                     DeepSpeed's shards: weights, optimiser
                                manifest.json                               written last, holds the run's counters

A folder without a manifest, or with a leading dot, is what an interrupted save left; it is never resumed from.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.config.errors import ConfigError
from common.config.renamed import with_new_names
from common.config.run import RunConfig
from deploy.curriculum import Feedback

_MANIFEST = "manifest.json"
# sections that do not change what is trained, and may differ when a run goes on
_FREE = ("output_dir", "pipeline", "evaluation", "ray", "publish", "dashboard", "wandb")


@dataclass
class RunState:
    """Counters of a run after `batches` rollout batches; `version` of the weights equals `batches`."""

    batches: int = 0
    updates: int = 0
    response_tokens: int = 0
    seconds: float = 0.0
    block_size: int = 0  # of the last batch; 0: none yet
    feedback: Feedback = field(default_factory=Feedback)
    summary: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run, newest last; `keep` of them stay."""

    def __init__(self, run_dir: Path, keep: int, copy_to: str | None) -> None:
        self.folder = run_dir.resolve() / "checkpoints"
        self.keep = keep
        self.copy_to = copy_to

    def begin(self, name: str) -> Path:
        """An empty folder for all ranks to write in."""
        partial = self.folder / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def finish(self, name: str, state: RunState) -> Path:
        """Write the manifest, give the folder its name, copy it where asked, prune older ones."""
        partial, final = self.folder / f".{name}.partial", self.folder / name
        (partial / _MANIFEST).write_text(json.dumps(asdict(state), indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        if self.copy_to:
            copy_folder(final, f"{self.copy_to.rstrip('/')}/{name}")
        for old in self.complete()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def complete(self) -> list[Path]:
        """Resumable checkpoints, oldest first."""
        return sorted(p.parent for p in self.folder.glob(f"batch-*/{_MANIFEST}"))

    def latest(self) -> tuple[Path, RunState] | None:
        """The newest resumable checkpoint and its counters."""
        complete = self.complete()
        if not complete:
            return None
        manifest = json.loads((complete[-1] / _MANIFEST).read_text())
        return complete[-1], RunState(**{**manifest, "feedback": Feedback(**manifest.get("feedback", {}))})


def copy_folder(source: Path, url: str) -> None:
    """Copy a folder to a folder or URL that `copy_target` knows."""
    from pyarrow import fs

    target, path = copy_target(url)
    target.create_dir(path, recursive=True)
    fs.copy_files(str(source), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=target)


def copy_target(url: str) -> tuple[Any, str]:
    """pyarrow's file system of `pipeline.copy_checkpoints_to`, and the path in it.

    Raises:
        ConfigError: it is neither a folder nor a URL of a file system that is known here.
    """
    from pyarrow import fs

    if "://" not in url:
        return fs.LocalFileSystem(), str(Path(url).resolve())
    try:
        found: tuple[Any, str] = fs.FileSystem.from_uri(url)
    except (ValueError, ImportError) as error:  # pyarrow's and fsspec's words for an unknown one
        raise ConfigError(
            f"pipeline.copy_checkpoints_to: {url!r} cannot be opened ({error}); give a folder, or a URL that begins "
            "with s3://, gs://, abfs://, hdfs://, file:// or fsspec+PROTOCOL:// (of any installed fsspec package)"
        ) from error
    return found


def check_same_run(config: RunConfig) -> None:
    """Refuse to resume with a config that would train something else.

    Raises:
        ConfigError: names the fields that differ and both values.
    """
    file = config.run_dir / "config.yaml"
    if not file.is_file():
        return
    before, now = with_new_names(yaml.safe_load(file.read_text())), config.model_dump(mode="json")
    different = [
        f"{path} was {old!r} and is {new!r}"
        for section in now
        if section not in _FREE
        for path, old, new in _differences(section, before.get(section), now[section])
    ]
    if different:
        raise ConfigError(
            "--resume: the config differs from the run's: " + "; ".join(different) + ". Use the run's own "
            f"{str(file)!r}, or start another run with --name"
        )


def _differences(path: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for key in keys for d in _differences(f"{path}.{key}", old.get(key), new.get(key))]
    return [] if old == new else [(path, old, new)]


def truncate_metrics(run_dir: Path, batches: int) -> None:
    """Drop logged batches that the checkpoint does not hold: they will be trained again."""
    file = run_dir / "metrics.jsonl"
    if file.is_file():
        lines = [line for line in file.read_text().splitlines() if json.loads(line)["batch"] < batches]
        file.write_text("".join(f"{line}\n" for line in lines))
