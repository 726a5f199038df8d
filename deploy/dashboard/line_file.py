"""A file of lines that another process appends to, cuts short or replaces."""

from __future__ import annotations

import os
from pathlib import Path


class LineFile:
    """Reads only the new lines, unless the lines that were read before have changed: then it reads the whole file.

    They have changed if the file was replaced (it has another inode), or if the last line that was read is no longer
    at its place: a file that was cut may have grown beyond that place since. A last line without its newline is left
    for the next read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.modified_ns = 0  # of the file at the last read
        self._inode = 0
        self._offset = 0  # behind the last line that was read
        self._last = b""

    def read(self) -> tuple[bool, list[bytes]]:
        """Whether the lines of earlier reads are no longer valid, and the new complete lines."""
        if not self.path.is_file():
            return False, []
        with self.path.open("rb") as file:
            stat = os.fstat(file.fileno())
            file.seek(self._offset - len(self._last))
            data = file.read()
            anew = stat.st_ino != self._inode or not data.startswith(self._last)
            if anew:
                self._offset, self._last = 0, b""
                file.seek(0)
                data = file.read()
        self._inode, self.modified_ns = stat.st_ino, stat.st_mtime_ns
        new = data[len(self._last) : data.rfind(b"\n") + 1]
        self._offset += len(new)
        lines = new.splitlines(keepends=True)
        self._last = lines[-1] if lines else self._last
        return anew, lines
