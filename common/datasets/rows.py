"""Where rows come from: a file, a folder, a saved data set or one of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.datasets.errors import PromptError
from common.datasets.folder import ALL_SPLITS, select_files
from common.datasets.formats import read_file
from common.datasets.hugging_face import has_subsets, is_hub_id, is_saved, library_rows, saved_rows


@dataclass(frozen=True)
class Rows:
    """The rows of a source as (place, record), in order; iterating reads them.

    `notes` are sentences that say what was left out.
    """

    read: Callable[[], Iterator[tuple[str, dict[str, Any]]]]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return self.read()


def open_rows(source: str, split: str | None = None, subset: str | None = None) -> Rows:
    """The rows of a file, of a folder of files, of a folder of `datasets.save_to_disk` or of a hub data set.

    `split` and `subset` choose among those of a data set; a folder of files has splits only, a file has neither.

    Raises:
        PromptError: the source does not exist, or it is not clear which of its files are meant. Iterating raises it
            for a broken file or row.
    """
    path = Path(source)
    if path.is_dir():
        if has_subsets(path):
            return Rows(lambda: library_rows(source, split, subset))
        if subset:
            raise PromptError(f"{source!r} has no subsets; set data.subset to null, and give the folder that is meant")
        if is_saved(path):
            return Rows(lambda: saved_rows(path, split))
        selection = select_files(path, split)
        return Rows(lambda: (row for file in selection.files for row in read_file(file)), tuple(selection.notes))
    if path.exists():
        if subset or split not in (None, ALL_SPLITS):
            raise PromptError(f"{source!r} is one file; set data.split and data.subset to null")
        return Rows(lambda: read_file(path))
    if is_hub_id(source):
        return Rows(lambda: library_rows(source, split, subset))
    raise PromptError(
        f"{str(path)!r} does not exist; give a JSON, JSONL, CSV or Parquet file (also .gz or .zst), a folder of them "
        "or of save_to_disk, or the hub id of a data set, such as openai/gsm8k"
    )
