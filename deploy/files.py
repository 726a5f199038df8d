"""Files that a reader, or a crash, never finds half written."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(path: Path, text: str, sync: bool = True) -> None:
    """Write a file so that there is the old content or the new, whatever happens meanwhile.

    Without `sync` that holds if the process dies, but not if the machine does: for what is written every second.
    """
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    partial.replace(path)


def synced_size(path: Path) -> int:
    """Bytes of a file, once all of them are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def drop_half_line(path: Path) -> bool:
    """Cut off a last line that a crash left without its end; whether there was one."""
    if not path.is_file():
        return False
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole == len(text):
        return False
    with path.open("r+b") as file:
        file.truncate(whole)
    return True
