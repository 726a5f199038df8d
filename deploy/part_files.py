"""A file that is made part by part, so that an interrupted command goes on where it stood when it is repeated.

Finished parts stand in FILE.parts with the settings that made them; the file appears when it is whole, and the folder
goes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from common.config.errors import ConfigError
from deploy.named_files import check_writable


class PartFiles:
    """The parts of one Parquet file, by index."""

    def __init__(self, output: Path) -> None:
        """Refuse a file of another kind, one that exists, and a place that cannot be written; makes nothing.

        Raises:
            ConfigError: names --output, the path and the remedy.
        """
        if output.suffix != ".parquet":
            raise ConfigError(f"--output: {str(output)!r} must end in .parquet")
        check_writable("--output", output.parent)
        if output.exists():
            raise ConfigError(f"--output: {str(output)!r} exists; remove it or choose another name")
        self.output = output
        self.folder = output.with_name(output.name + ".parts")

    def open(self, settings: dict[str, Any]) -> None:
        """Make the folder, or go on with one that the same settings (as JSON) have made.

        Raises:
            ConfigError: other settings made it.
        """
        file = self.folder / "settings.json"
        if file.exists() and json.loads(file.read_text()) != settings:
            raise ConfigError(
                f"--output: {str(self.folder)!r} was left by a command with other settings: "
                f"{file.read_text().strip()}; repeat it with these, or remove the folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))

    def has(self, index: int) -> bool:
        return self._part(index).exists()

    def read(self, index: int) -> pa.Table:
        return parquet.read_table(self._part(index))

    def write(self, index: int, table: pa.Table) -> None:
        _write(table, self._part(index))

    def finish(self, table: pa.Table) -> None:
        """Write the whole file and remove the parts."""
        _write(table, self.output)
        shutil.rmtree(self.folder)

    def _part(self, index: int) -> Path:
        return self.folder / f"part-{index:06d}.parquet"


def _write(table: pa.Table, file: Path) -> None:
    """Whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    parquet.write_table(table, partial)
    partial.rename(file)
