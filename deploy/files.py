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
