"""Data sets as the `datasets` library reads them: of the Hugging Face hub, copied from it, or of `save_to_disk`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from common.datasets.errors import PromptError
from common.datasets.folder import ALL_SPLITS
from common.datasets.formats import format_of

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_BATCH_ROWS = 1024


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def is_hub_id(source: str) -> bool:
    """Whether a path that does not exist can be `organisation/name` of a hub data set."""
    return bool(_HUB_ID.fullmatch(source)) and format_of(Path(source)) is None and not Path(source).parent.is_dir()


def has_subsets(path: Path) -> bool:
    """Whether a folder is the copy of a hub data set whose README lists subsets: which files are meant stands there."""
    readme = path / "README.md"
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---\n", 2) if readme.is_file() else []
    if len(parts) < 3 or parts[0].strip():
        return False
    try:
        header = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return False  # not the header of a data set
    return isinstance(header, dict) and bool(header.get("configs"))


def saved_rows(path: Path, split: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of every row of a saved data set.

    Raises:
        PromptError: it is damaged, or holds several splits and none of them is named.
    """
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
        if isinstance(found, datasets.DatasetDict):
            chosen = _one_split(str(path), list(found), split)
            found = datasets.concatenate_datasets(found.values()) if chosen == ALL_SPLITS else found[chosen]
        elif split not in (None, ALL_SPLITS) and split != (found.split or split):
            raise PromptError(f"{str(path)!r} holds the split {str(found.split)!r} only; set data.split to null")
        yield from _rows(str(path), found)
    except PromptError:
        raise
    except Exception as error:  # the library's own, pyarrow's and the file system's
        raise PromptError(
            f"{str(path)!r} cannot be read as a saved data set ({_said(error)}); save it again"
        ) from error


def library_rows(source: str, split: str | None, subset: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of every row of a split of a hub data set, or of the copy of one in a folder.

    Raises:
        PromptError: it cannot be brought or read, or the split or the subset is to be named.
    """
    import datasets

    try:
        names = datasets.get_dataset_config_names(source)
        if subset is None and len(names) > 1:
            raise PromptError(f"{source!r} has several subsets, {', '.join(names)}; set data.subset to one of them")
        builder = datasets.load_dataset_builder(source, subset)
        splits = list(builder.info.splits or datasets.get_dataset_split_names(source, subset))
        sliced = split is not None and "[" in split  # as in train[:1000], which the library reads
        rows = datasets.load_dataset(source, subset, split=split if sliced else _one_split(source, splits, split))
    except PromptError:
        raise
    except Exception as error:  # the library's own, the hub's and the network's
        if Path(source).is_dir():
            raise PromptError(
                f"{source!r} cannot be read as a copy of a hub data set ({_said(error)}); fix it"
            ) from error
        raise PromptError(
            f"{source!r} is no file or folder here, and as a data set of the hub it cannot be brought "
            f"({_said(error)}); check the name, or bring it where there is a network with "
            f"hf download {source} --repo-type dataset --local-dir FOLDER, and give FOLDER"
        ) from error
    yield from _rows(source, rows)


def _one_split(source: str, splits: list[str], wanted: str | None) -> str:
    if wanted is None and len(splits) == 1:
        return splits[0]
    if wanted is None or wanted not in (*splits, ALL_SPLITS):
        which = f"no split {wanted!r}, only" if wanted else "several splits,"
        raise PromptError(
            f"{source!r} has {which} {', '.join(splits)}; set data.split to one of them, or to {ALL_SPLITS!r}"
        )
    return wanted


def _rows(source: str, found: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for table in found.with_format("arrow").iter(_BATCH_ROWS):  # as stored: no images or sounds are decoded
        for record in table.to_pylist():
            number += 1
            yield f"{source}, row {number}", record
    if not number:
        raise PromptError(f"{source!r} is empty; fill it or remove it")


def _said(error: Exception) -> str:
    """The library's words as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
