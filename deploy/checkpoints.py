"""Checkpoints: complete Hugging Face folders with the state to go on from, written atomically.

    checkpoints/batch-000040/   config.json, tokenizer, model.safetensors   loads like any model folder
                                resume/                                     the ranks' shards: weights, optimizer
                                manifest.json                               written last: the run's counters, and length
                                                                            and SHA-256 of every file
    checkpoints/final/          the same without resume/: the training is finished

A folder without a manifest, or with a leading dot, is what an interrupted save left; it is never resumed from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.config.errors import ConfigError, explain
from common.config.file import load_resolved
from common.config.fingerprint import differences, fingerprint
from common.config.run import RunConfig
from deploy.curriculum import Feedback
from deploy.files import replace_text, synced_size
from deploy.monitoring.observer import Observers
from deploy.roles import ROLES

MANIFEST = "manifest.json"
FINAL = "final"
_READERS = 4


@dataclass
class RunState:
    """Counters of a run after `batches` rollout batches; `version` of the weights equals `batches`."""

    batches: int = 0
    updates: int = 0
    nonfinite_updates: int = 0  # of these, left out
    response_tokens: int = 0
    other_teachers_tokens: dict[str, int] = field(default_factory=dict)  # of these, by teacher; the rest is the first's
    rollout_token_rows: float = 0  # what the samplers computed, see Sampler.token_rows
    seconds: float = 0.0
    block_size: int = 0  # of the last batch; 0: none yet
    restarts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))
    repair_seconds: float = 0.0  # of the last fault; 0: none
    set_aside: int = 0  # prompts
    feedback: Feedback = field(default_factory=Feedback)
    summary: dict[str, Any] = field(default_factory=dict)


Count = Annotated[int, Field(ge=0, le=2**53, strict=True)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Manifest(BaseModel):
    """What later releases add is ignored, what earlier ones had not is the default."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class FileSum(_Manifest):
    bytes: Count
    sha256: str


class FeedbackFields(_Manifest):
    gates: Count = 0
    stopped: bool = False
    growths: Count = 0
    divergences: list[float] = []
    acceptances: list[float] = []


class Manifest(_Manifest):
    """manifest.json of a checkpoint: the fields of RunState, and what they belong to. Earlier releases wrote the
    length of a file alone."""

    batches: Count
    updates: Count
    nonfinite_updates: Count = 0
    response_tokens: Count = 0
    other_teachers_tokens: dict[str, Count] = {}
    rollout_token_rows: Amount = 0.0
    seconds: Amount = 0.0
    block_size: Count = 0
    restarts: dict[str, Count] = dict.fromkeys(ROLES, 0)
    repair_seconds: Amount = 0.0
    set_aside: Count = 0
    feedback: FeedbackFields = FeedbackFields()
    summary: dict[str, Any] = {}
    config_fingerprint: str | None = None
    data: dict[str, str] = {}
    files: dict[str, Count | FileSum] = {}


class Checkpoints:
    """The checkpoints of one run, newest last; `pipeline.keep_checkpoints` of them stay.

    `data` says what the run reads (deploy/data_fingerprint.py); it goes into every manifest.
    """

    def __init__(self, config: RunConfig, data: Mapping[str, str] | None = None) -> None:
        self._data = dict(data or {})
        self.folder = config.run_dir.resolve() / "checkpoints"
        self.final = self.folder / FINAL
        self._keep = config.pipeline.keep_checkpoints
        self._copy_to = config.pipeline.copy_checkpoints_to
        self._fingerprint = fingerprint(config)
        self._missing_copies: list[str] = []
        self.damaged: list[str] = []

    def begin(self, name: str) -> Path:
        """An empty folder for all ranks to write in."""
        partial = self.folder / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def finish(self, name: str, state: RunState) -> tuple[Path, int]:
        """Write the manifest and give the folder its name; returns it, and the bytes in it."""
        partial, final = self.folder / f".{name}.partial", self.folder / name
        files = described_files(partial)
        manifest = {**asdict(state), "config_fingerprint": self._fingerprint, "data": self._data, "files": files}
        replace_text(partial / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        if self._copy_to:
            self._missing_copies.append(name)
        return final, sum(file["bytes"] for file in files.values())

    def abandon(self, name: str) -> None:
        """Free the space of a checkpoint that could not be written."""
        shutil.rmtree(self.folder / f".{name}.partial", ignore_errors=True)

    def prune(self) -> None:
        """Remove all but the newest, once they are copied as far as that works."""
        for old in self.complete()[: -self._keep]:
            shutil.rmtree(old)

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

    def latest(self, accept_changed_data: bool = False) -> tuple[Path, RunState] | None:
        """What a run goes on from, and its counters: the final model of a finished training, else the newest whole
        checkpoint. What is wrong with newer ones is in `damaged`.

        Raises:
            ConfigError: none is whole; or it was made by a training of another config or on other data.
        """
        folders = [*self.complete(), *([self.final] if self.has(FINAL) else [])]
        self.damaged = []
        while folders:
            folder = folders.pop()
            try:
                manifest = read_manifest(folder)
            except DamagedCheckpoint as error:
                self.damaged.append(f"checkpoint {folder.name} is not whole and is left aside: {error}")
                continue
            self._check_same(folder, manifest, accept_changed_data)
            state = {f.name: getattr(manifest, f.name) for f in fields(RunState)}
            return folder, RunState(**state | {"feedback": Feedback(**manifest.feedback.model_dump())})
        if self.damaged:
            raise ConfigError(
                "--resume: " + "; ".join(self.damaged) + ". No other is left; bring a copy back, or begin anew with "
                "--overwrite"
            )
        return None

    def _check_same(self, folder: Path, manifest: Manifest, accept_changed_data: bool) -> None:
        """Manifests of earlier releases have neither fingerprint."""
        if manifest.config_fingerprint not in (None, self._fingerprint):
            raise ConfigError(
                f"--resume: {str(folder)!r} was made with another config than the run has now; start another run with "
                "--name"
            )
        changed = [field for field, value in self._data.items() if manifest.data.get(field, value) != value]
        if changed and folder.name != FINAL and not accept_changed_data:  # a finished training reads them no more
            raise ConfigError(
                f"--resume: what {' and '.join(changed)} holds has changed since {folder.name} was written; bring the "
                "old content back, start another run with --name, or go on with --accept-changed-data, which trains "
                f"the prompts of the new order that come after the {manifest.batches} batches that are done"
            )


class DamagedCheckpoint(Exception):  # noqa: N818 (what it is)
    """A checkpoint that a crash or a full disk has cut; the message says where."""


def described_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Length and SHA-256 of every file in a folder, once all of them are on the disk; by their relative paths."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    names = [p.relative_to(folder).as_posix() for p in paths]
    return {n: {"bytes": synced_size(p), "sha256": s} for n, p, s in zip(names, paths, checksums(paths), strict=True)}


def checksums(paths: list[Path]) -> list[str]:
    """The SHA-256 of files, in hexadecimal digits."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(_checksum, paths))


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files all hold what was written.

    Raises:
        DamagedCheckpoint: the manifest or a file is not whole.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{MANIFEST} cannot be read ({error!r})") from error
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise DamagedCheckpoint(f"{MANIFEST}: {explain(error.errors()[0], Manifest)}") from error
    sizes = {name: file if isinstance(file, int) else file.bytes for name, file in manifest.files.items()}
    hashes = {name: file.sha256 for name, file in manifest.files.items() if not isinstance(file, int)}
    for name, size in sizes.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            raise DamagedCheckpoint(f"{name} has {'no file' if found is None else f'{found} bytes'}, not {size} bytes")
    for name, checksum in zip(hashes, checksums([folder / name for name in hashes]), strict=True):
        if checksum != hashes[name]:
            raise DamagedCheckpoint(f"{name} has the SHA-256 {checksum[:8]}..., not {hashes[name][:8]}...")
    return manifest


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
