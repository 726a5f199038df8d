"""Which files of a folder hold the rows that are meant; whatever is left out is said."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from common.datasets.errors import PromptError
from common.datasets.formats import format_of, known_formats, stem_of

ALL_SPLITS = "all"
_SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}")  # as in train-00000-of-00003.parquet
_SPLIT_WORDS = {  # those of the datasets library, and "heldout"
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "heldout"), "test"),
}
_CHECKPOINT = re.compile(r"checkpoints?([-_]\d+)?|.+-checkpoint\..+", re.IGNORECASE)  # a trainer's, and Jupyter's
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json"}
_SHOWN = 3  # names in a note


@dataclass(frozen=True)
class Selection:
    """The files to read, in sorted order, and a sentence for each kind of thing that was left out."""

    files: list[Path]
    notes: list[str]


def select_files(folder: Path, split: str | None) -> Selection:
    """The files of a folder and of the folders in it, links followed, each file once.

    Left out: hidden and checkpoint folders and files, other formats, and files that describe a data set. Where the
    names tell several splits, `split` says which one is meant (`all`: every one).

    Raises:
        PromptError: nothing is left; a split is to be named, or is unknown; a link leads nowhere; or two files with
            the same name hold the same rows in two formats.
    """
    left_out: dict[str, list[Path]] = defaultdict(list)
    files = _of_one_split(folder, _walk(folder, left_out), split, left_out)
    notes = [_note(folder, reason, paths) for reason, paths in left_out.items()]
    if not files:
        said = f" ({'; '.join(notes)})" if notes else ""
        raise PromptError(f"folder {str(folder)!r} holds no {known_formats()} file{said}; put the prompts there")
    _refuse_two_formats(files)
    return Selection(files, notes)


def _walk(folder: Path, left_out: dict[str, list[Path]]) -> list[Path]:
    found: list[Path] = []
    seen = {os.path.realpath(folder)}

    def unreadable(error: OSError) -> None:
        raise PromptError(f"{error.filename!r} cannot be read ({error.strerror}); change its permissions") from error

    for root, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        entered = []
        for name in sorted(folders):
            path = Path(root, name)
            if reason := _aside(name):
                left_out[reason].append(path)
            elif (real := os.path.realpath(path)) in seen or Path(real) in Path(os.path.realpath(root), "x").parents:
                left_out["read already, by another link"].append(path)
            else:
                seen.add(real)
                entered.append(name)
        folders[:] = entered
        for name in sorted(names):
            path = Path(root, name)
            if reason := _aside(name):
                left_out[reason].append(path)
            elif not path.exists():
                raise PromptError(f"{str(path)!r} is a link to {os.readlink(path)!r}, which does not exist; remove it")
            elif format_of(path) is None or name in _DESCRIPTIONS:
                left_out["of another kind"].append(path)
            else:
                found.append(path)
    files = []
    for path in sorted(found):
        if (real := os.path.realpath(path)) in seen:
            left_out["read already, by another link"].append(path)
        else:
            seen.add(real)
            files.append(path)
    return files


def _aside(name: str) -> str | None:
    """Why a file or folder of this name is not looked at."""
    if name.startswith((".", "_")):
        return "hidden"
    return "of a checkpoint" if _CHECKPOINT.fullmatch(name) else None


def _of_one_split(folder: Path, files: list[Path], wanted: str | None, left_out: dict[str, list[Path]]) -> list[Path]:
    by_split: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        by_split[split_of(file.relative_to(folder))].append(file)
    splits = sorted(name for name in by_split if name)
    if wanted == ALL_SPLITS or (wanted is None and len(splits) < 2):
        return files
    if wanted is None or wanted not in splits:
        which = f"no split {wanted!r}, only" if wanted else "several splits,"
        raise PromptError(
            f"folder {str(folder)!r} holds {which} {', '.join(splits) or 'files without one'}; set data.split to one "
            f"of them, or to {ALL_SPLITS!r}"
        )
    for name, members in by_split.items():
        if name != wanted:
            left_out["of another split"].extend(members)
    return by_split[wanted]


def split_of(path: Path) -> str:
    """The split that a path in a folder tells by its file name or, failing that, its folders; empty: none."""
    if shard := _SHARD.match(path.name):
        return _SPLIT_WORDS.get(shard["split"].lower(), shard["split"])
    for part in (stem_of(path), *reversed(path.parts[:-1])):
        for word in re.split(r"[\W\d_]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return ""


def _refuse_two_formats(files: list[Path]) -> None:
    by_name: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    for file in files:
        by_name[file.parent, stem_of(file)].append(file)
    for same in by_name.values():
        if len(same) > 1:
            raise PromptError(
                f"{' and '.join(repr(str(file)) for file in same)} have the same name in two formats, so their rows "
                "would be used twice; remove one, or give the file instead of the folder"
            )


def _note(folder: Path, reason: str, paths: list[Path]) -> str:
    names = [str(path.relative_to(folder)) for path in paths[:_SHOWN]] + ["..."] * (len(paths) > _SHOWN)
    return f"{folder}: left out {len(paths)} {reason} ({', '.join(names)})"
