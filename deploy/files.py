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


class LineWriter:
    """A file that only grows, line by line; what a full disk does not take is kept, and written with the next line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting = b""

    def append(self, line: str) -> None:
        """Write all lines that wait, and this one.

        Raises:
            OSError: not all of them could be written; they wait for the next call.
        """
        self._waiting += line.encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Write all lines that wait; raises as `append` does."""
        with self._path.open("ab", buffering=0) as file:
            while self._waiting:
                self._waiting = self._waiting[file.write(self._waiting) :]


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
