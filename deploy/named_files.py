"""Files that the user names: one that cannot be written is refused by the name of its option, before any work where
that can be known."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError

from common.config.errors import ConfigError


def check_output(field: str, path: Path, suffix: str) -> None:
    """Refuse a file to write of another kind, or in a folder that is missing or read-only.

    Raises:
        ConfigError: names the option, the path and the remedy.
    """
    if path.suffix != suffix or path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{field}: {str(path)!r} must be a {suffix} file in a folder that exists")
    check_writable(field, path.parent)


def check_writable(field: str, folder: Path) -> None:
    """Refuse a folder in which, or in whose nearest parent that exists, no file can be made; makes and leaves nothing.

    Raises:
        ConfigError: names the option, the path and the remedy.
    """
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    try:
        with TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(
            f"{field}: cannot write in {str(folder)!r} ({str(existing)!r}: {error.strerror}); choose another folder"
        ) from error


@contextmanager
def writing(field: str, path: Path) -> Iterator[None]:
    """Around the writing of a file or folder that an option names.

    Raises:
        ConfigError: it failed, such as for a full disk.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # not of a file: a library's own
        raise ConfigError(
            f"{field}: {str(path)!r} could not be written ({getattr(error, 'strerror', None) or error}); free space, "
            "or write to another place"
        ) from error
