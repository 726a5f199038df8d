"""The folder of a run: what a run leaves there, who works in it, and what may be replaced.

Only what a run has written is ever removed. A folder with anything else in it, even one file, is left alone.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from common.config.errors import ConfigError
from common.config.fields import path_fields
from common.config.file import read_yaml, value_at
from common.config.run import RunConfig
from deploy.checkpoints import check_same_run
from deploy.named_files import check_writable
from deploy.run_lock import in_progress, living_owner

# everything that a run writes, by the names in its folder and in checkpoints/
_WRITTEN = re.compile(
    r"config\.yaml|run\.lock|(?:summary|status|held_out)\.json|(?:metrics|events|trajectories)\.jsonl|wandb_id|wandb|tensorboard|spool|faults|"
    r"anchors|"
    r"checkpoints|checkpoints/(?:final|batch-\d+)|(?:checkpoints/)?\.[^/]+\.partial"
)


def check_run_dir(config: RunConfig, overwrite: bool, resume: bool = False) -> None:
    """Refuse a folder that cannot be written or holds another run; with `overwrite` one that is not a run, is in use,
    or holds what this run needs; with `resume` one of another config.

    Raises:
        ConfigError: names the folder, what is in it, and the remedy.
    """
    folder = config.run_dir
    check_writable("output_dir", folder)
    copies = config.pipeline.copy_checkpoints_to
    if copies and "://" not in copies and _inside(Path(copies), folder):
        raise ConfigError(
            f"pipeline.copy_checkpoints_to: {copies!r} lies in the run's own folder {str(folder)!r}; choose another"
        )
    if owner := living_owner(folder):
        raise in_progress(folder, owner)
    if resume:
        check_same_run(config)
        return
    if overwrite:
        _check_replaceable(config)
        return
    metrics = folder / "metrics.jsonl"
    if metrics.is_file() and metrics.stat().st_size:
        state = "a finished" if (folder / "summary.json").exists() else "an unfinished"
        raise ConfigError(
            f"name: {str(folder)!r} holds {state} run; choose another --name, or replace it with --overwrite"
            + (", or go on with --resume auto" if state == "an unfinished" else "")
        )


def anchor_folder(config: RunConfig, block_size: int) -> Path:
    """Where the student that a run has trained with a block size is kept as a teacher (block_growth.anchor)."""
    return config.run_dir.absolute() / "anchors" / f"block-{block_size}"


def anchor_of(config: RunConfig, block_size: int) -> Path | None:
    """The student that teaches while blocks have this size; None: the original does."""
    if not config.block_growth.anchor or block_size == config.block_size:
        return None
    sizes = config.block_sizes
    return anchor_folder(config, sizes[sizes.index(block_size) - 1])


def clear_run_dir(config: RunConfig) -> None:
    """Remove an earlier run, and say so; the folder is checked once more, since the checks of a start take a while.

    It is moved aside first, so that what is left by an interrupted removal is never taken for a run.

    Raises:
        ConfigError: it cannot be removed, or what `check_run_dir` refuses.
    """
    folder = config.run_dir
    if not os.path.lexists(folder):
        return
    check_run_dir(config, overwrite=True)
    Console(stderr=True).print(Text(f"--overwrite: removing {str(folder)!r}"), soft_wrap=True)
    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name[:100]}.", suffix=".removed", dir=folder.parent))
        shutil.rmtree(folder.rename(aside / folder.name))
        aside.rmdir()
    except OSError as error:
        raise ConfigError(
            f"name: {str(folder)!r} cannot be removed ({error.strerror}); choose another --name, or remove it yourself"
        ) from error


def foreign_entries(folder: Path) -> list[str]:
    """What lies in a run's folder, or in its checkpoints/, and was written by no run; paths relative to the folder."""
    inside = [*folder.iterdir(), *(folder / "checkpoints").glob("*")]
    return sorted(name for p in inside if not _WRITTEN.fullmatch(name := p.relative_to(folder).as_posix()))


def _check_replaceable(config: RunConfig) -> None:
    folder = config.run_dir
    if folder.is_symlink():
        raise ConfigError(
            f"name: {str(folder)!r} is a link to {str(folder.resolve())!r}, which --overwrite does not follow; remove "
            "the link, or choose another --name"
        )
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not _is_config(folder / "config.yaml"):
        raise ConfigError(
            f"name: {str(folder)!r} is not the folder of a run, so it is not replaced; choose another --name"
        )
    if foreign := foreign_entries(folder):
        raise ConfigError(
            f"name: {str(folder)!r} holds {foreign[0]!r}, which no run has written, so it is not replaced; move that "
            "away, or choose another --name"
        )
    for field in path_fields("input"):
        path = value_at(config, field)
        if path and os.path.exists(path) and _inside(Path(path), folder):
            raise ConfigError(
                f"{field}: {path!r} lies in {str(folder)!r}, which --overwrite would remove; copy it elsewhere, or "
                "choose another --name"
            )
    if _inside(Path.cwd(), folder):
        raise ConfigError(f"name: {str(folder)!r} is the folder you are in, so it is not replaced; change to another")


def _is_config(file: Path) -> bool:
    try:
        return {"model", "data"} <= read_yaml(file).keys()
    except ConfigError:
        return False


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
