"""Checkpoints: complete Hugging Face folders with the state to go on from, written atomically.

    checkpoints/batch-000040/   config.json, tokenizer, model.safetensors   loads like any model folder
                                resume/                                     DeepSpeed's shards: weights, optimizer
                                manifest.json                               written last, holds the run's counters
    checkpoints/final/          the same without resume/: the training is finished

A folder without a manifest, or with a leading dot, is what an interrupted save left; it is never resumed from.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from common.config.errors import ConfigError
from common.config.file import load_resolved
from common.config.fingerprint import differences, fingerprint
from common.config.run import RunConfig
from deploy.curriculum import Feedback
from deploy.files import replace_text
from deploy.monitoring.observer import Observers

MANIFEST = "manifest.json"
FINAL = "final"


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
    """The checkpoints of one run, newest last; `pipeline.keep_checkpoints` of them stay."""

    def __init__(self, config: RunConfig) -> None:
        self.folder = config.run_dir.resolve() / "checkpoints"
        self.final = self.folder / FINAL
        self._keep = config.pipeline.keep_checkpoints
        self._copy_to = config.pipeline.copy_checkpoints_to
        self._fingerprint = fingerprint(config)
        self._missing_copies: list[str] = []

    def begin(self, name: str) -> Path:
        """An empty folder for all ranks to write in."""
        partial = self.folder / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def finish(self, name: str, state: RunState, observers: Observers) -> Path:
        """Write the manifest, give the folder its name, copy it where asked, prune older ones."""
        partial, final = self.folder / f".{name}.partial", self.folder / name
        manifest = {**asdict(state), "config_fingerprint": self._fingerprint}
        replace_text(partial / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        if self._copy_to:
            self._missing_copies.append(name)
            self.copy_missing(observers)
        for old in self.complete()[: -self._keep]:
            shutil.rmtree(old)
        return final

    def copy_missing(self, observers: Observers) -> None:
        """Try again to copy what is not copied yet. A copy that fails is a warning: the checkpoint itself is safe, and
        training goes on."""
        for name in list(self._missing_copies):
            target = f"{str(self._copy_to).rstrip('/')}/{name}"
            if not self.has(name):
                observers.note(f"checkpoint {name} was never copied to {target} and is pruned here", "warning")
                self._missing_copies.remove(name)
                continue
            try:
                copy_folder(self.folder / name, target)
                self._missing_copies.remove(name)
            except Exception as error:  # every file system has errors of its own
                observers.note(
                    f"copying checkpoint {name} to {target} failed ({error}); it is tried again after the next one",
                    "warning",
                )

    def has(self, name: str) -> bool:
        return (self.folder / name / MANIFEST).is_file()

    def complete(self) -> list[Path]:
        """Resumable checkpoints, oldest first."""
        return sorted(p.parent for p in self.folder.glob(f"batch-*/{MANIFEST}"))

    def latest(self) -> tuple[Path, RunState] | None:
        """What a run goes on from, and its counters: the final model of a finished training, else the newest resumable
        checkpoint.

        Raises:
            ConfigError: it was made by a training of another config.
        """
        folders = [self.final] if self.has(FINAL) else self.complete()
        if not folders:
            return None
        manifest = json.loads((folders[-1] / MANIFEST).read_text())
        if manifest.pop("config_fingerprint", self._fingerprint) != self._fingerprint:  # older ones have none
            raise ConfigError(
                f"--resume: {str(folders[-1])!r} was made with another config than the run has now; start another run "
                "with --name"
            )
        known = {f.name for f in fields(RunState)}
        state = {name: value for name, value in manifest.items() if name in known}
        return folders[-1], RunState(**{**state, "feedback": Feedback(**state.get("feedback", {}))})


def copy_folder(source: Path, url: str) -> None:
    """Copy a checkpoint to a folder or URL that `copy_target` knows; its manifest goes first there and comes last, so
    that a copy with a manifest is whole."""
    from pyarrow import fs

    here = fs.LocalFileSystem()
    target, path = copy_target(url)
    target.create_dir(path, recursive=True)
    if target.get_file_info(f"{path}/{MANIFEST}").is_file:
        target.delete_file(f"{path}/{MANIFEST}")
    for entry in sorted(source.iterdir(), key=lambda p: p.name == MANIFEST):
        there = f"{path}/{entry.name}"
        if entry.is_dir():
            target.create_dir(there, recursive=True)
        fs.copy_files(str(entry), there, source_filesystem=here, destination_filesystem=target)


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
    if different := differences(load_resolved(file), config):
        raise ConfigError(
            "--resume: the config differs from the run's: " + "; ".join(different) + ". Use the run's own "
            f"{str(file)!r}, or start another run with --name"
        )
