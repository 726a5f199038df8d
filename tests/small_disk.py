"""A file system of a few MiB, to be filled."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """A file system in memory at `folder`; the test is skipped where it may not be mounted."""
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take all the space; returns the file that does."""
    file = folder / "filling"
    with file.open("wb", buffering=0) as out:
        try:
            while out.write(bytes(2**16)):
                pass
        except OSError:
            return file
    raise AssertionError(f"{folder} does not fill")
